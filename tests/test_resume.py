"""Runs that are stopped anywhere go on from what is finished, and end with the bytes of a run that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_cases
import factories
import task_files
from onnx_exports import traced_once
from qexport.artifact import describe_environment
from qexport.artifact.partial import MARKER_NAME
from qexport.cli.app import main
from qexport.errors import GO_ON, NumericalError, RecipeError, ResourceError
from qexport.pipeline import Result, plan, recording, resuming, run, texts
from qexport.pipeline.finished import FinishedRun
from qexport.progress import Notice, Progress
from qexport.recipe import Recipe
from qexport.text import needles

TWO = [{"layout": "safetensors"}, {"layout": "vllm"}]
CASES: Mapping[str, tuple[str, list[dict[str, Any]], int]] = {
    "gptq": ("gptq", TWO, 2),
    "gptq with head, in shards": ("gptq 8 bits, rows, head", artifact_cases.LAYOUTS["safetensors shards"], 1),
    "nf4 double": ("nf4 double", artifact_cases.LAYOUTS["shared"], 2),
    "int8": ("int8", [{"layout": "safetensors"}, {"layout": "onnx"}], 1),
    "none": ("none", [*TWO, {"layout": "gguf"}], 1),
}
"""Method, layouts, and how many kills."""


@dataclass(frozen=True)
class Ended:
    """A run in a process of its own.

    Attributes:
        killed: whether it was.
        operations: how many file operations it began; 0 if it was killed.
        events: what it told, as (stage, done, detail), or a notice's text.
    """

    killed: bool
    operations: int
    events: list[Any]

    def quantized(self) -> list[int]:
        """What was finished at each step of quantizing."""
        return [event[1] for event in self.events if isinstance(event, list) and event[0] == "quantize"]


def recipe(folder: Path, method: str, exports: list[dict[str, Any]], output: Path) -> Recipe:
    return Recipe.model_validate(artifact_cases.recipe(folder, method, exports) | {"output": str(output)})


def counted(kill_at: int | None) -> list[int]:
    """Counts operations that change files, and kills the process at the one of that number."""
    count = [0]

    def counting(honest: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **options)

        return operation

    for name in ("pwrite", "fsync", "truncate", "ftruncate", "link", "unlink", "rename", "replace", "rmdir", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))
    return count


def in_child(chosen: Recipe, *, kill_at: int | None = None) -> Ended:
    """A run in a forked process. One thread computes, so nothing that a fork would lose."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = counted(kill_at)

            def tell(event: Progress | Notice) -> None:
                told = event.text if isinstance(event, Notice) else [event.stage, event.done, event.detail]
                os.write(writing, json.dumps(told).encode() + b"\n")

            run(chosen, device="cpu", progress=tell)
            os.write(writing, json.dumps(count[0]).encode() + b"\n")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        events = [json.loads(line) for line in pipe]
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return Ended(True, 0, events)
    assert status == 0
    return Ended(False, events.pop(), events)


def prepare_children(chosen: Recipe) -> None:
    """Imports, the machine's speed and the trace, which each child would make again."""
    for layout in plan(chosen).layouts:
        layout.prepare()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def each_model_is_traced_once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    artifact_cases.prepare("llama", folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(name: str, inputs: Path, tmp_path: Path) -> None:
    method, exports, kills = CASES[name]
    chosen = recipe(inputs, method, exports, tmp_path / "whole")
    prepare_children(chosen)
    whole = in_child(chosen)
    assert not whole.killed
    chance = random.Random(name)
    for number in range(kills):
        output = tmp_path / str(number)
        again = recipe(inputs, method, exports, output)
        first = in_child(again, kill_at=chance.randrange(1, whole.operations + 1))
        assert first.killed
        if output.exists():  # the rename was done
            continue
        second = in_child(again)
        assert contents(output) == contents(tmp_path / "whole")
        assert not output.with_name(f"{number}.partial").exists()
        if method.startswith("gptq") and first.quantized():
            assert second.quantized()[0] >= first.quantized()[-1] - 1


def test_a_run_that_was_killed_again_and_again_does_nothing_twice_but_the_last(inputs: Path, tmp_path: Path) -> None:
    """Killed at every tenth operation or so, until nothing is left to kill."""
    chosen, whole = (recipe(inputs, "gptq", TWO, tmp_path / name) for name in ("often", "whole"))
    prepare_children(whole)
    operations, chance = in_child(whole).operations, random.Random(0)
    runs = [in_child(chosen, kill_at=chance.randrange(operations // 4, operations // 2)) for _ in range(3)]
    runs.append(in_child(chosen))
    assert contents(tmp_path / "often") == contents(tmp_path / "whole")
    for before, after in pairwise(runs):
        if before.quantized():
            assert after.quantized()[0] >= before.quantized()[-1] - 1


class Stop(KeyboardInterrupt):
    """As if by Ctrl-C."""


def stopped(chosen: Recipe, when: Callable[[Progress], bool]) -> None:
    """Interrupts a run at the first step that is meant."""

    def tell(event: Progress | Notice) -> None:
        if isinstance(event, Progress) and when(event):
            raise Stop

    with pytest.raises(Stop) as caught:
        run(chosen, device="cpu", progress=tell)
    assert GO_ON in caught.value.__notes__


def told(chosen: Recipe, **options: Any) -> tuple[Result, list[Progress | Notice]]:
    events: list[Progress | Notice] = []
    return run(chosen, device="cpu", progress=events.append, **options), events


def steps(events: Sequence[Progress | Notice]) -> list[int]:
    """What was finished at each step of quantizing."""
    return [event.done for event in events if isinstance(event, Progress) and event.stage == "quantize"]


@pytest.fixture(scope="module")
def interrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and a run that was interrupted after its first block."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    stopped(recipe(folder, "gptq", TWO, folder / "out"), lambda event: event.stage == "quantize" and event.done == 1)
    return folder


@pytest.fixture
def left(interrupted: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, which a test may change; it is as before afterwards, but for times and inodes."""
    shutil.copytree(interrupted, tmp_path / "kept")
    yield interrupted
    shutil.rmtree(interrupted)
    shutil.copytree(tmp_path / "kept", interrupted)


def going_on(folder: Path, **changes: Any) -> tuple[Result, list[Progress | Notice]]:
    chosen = recipe(folder, "gptq", TWO, folder / "out")
    return told(chosen.model_copy(update=changes))


def test_a_run_says_that_it_goes_on(left: Path) -> None:
    _, events = going_on(left)
    (notice,) = [event.text for event in events if isinstance(event, Notice) and "going on" in event.text]
    numbers = re.findall(r"(\d+) of (\d+) tensors", notice)
    assert 0 < int(numbers[0][0]) <= int(numbers[0][1])


def appended(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"text": "one more passage, long enough to be read"}\n')


def flipped(path: Path, place: int = -1) -> None:
    """Another byte, with the file's size and time as before."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("inputs.base: model.safetensors", lambda folder: flipped(folder / "base" / "model.safetensors", -1)),
        ("inputs.adapter.adapter_model", lambda folder: flipped(folder / "adapter" / "adapter_model.safetensors", -1)),
        ("inputs.calibration", lambda folder: appended(folder / "calibration.jsonl")),
    ],
)
def test_an_input_that_has_changed_is_named(left: Path, name: str, change: Callable[[Path], None]) -> None:
    change(left)
    kept = contents(left / "out.partial")
    with pytest.raises(RecipeError, match="differs") as caught:
        going_on(left)
    assert name in str(caught.value.where)
    assert "--restart" in str(caught.value.mend)
    assert contents(left / "out.partial") == kept


def test_another_recipe_or_program_or_processor_is_named(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = recipe(left, "gptq", TWO, left / "out").quantize.model_copy(update={"damp_percent": 0.5})
    with pytest.raises(RecipeError, match="differs") as caught:
        going_on(left, quantize=quantize)
    assert "recipe.quantize.damp_percent: was 0.01, is 0.5" in str(caught.value.where)
    honest = describe_environment
    changed = {"torch": "1.0", "cpu_capability": "AVX1024"}
    monkeypatch.setattr(resuming, "version", lambda _: "0.0.1")
    monkeypatch.setattr(resuming, "describe_environment", lambda device: honest(device).model_copy(update=changed))
    with pytest.raises(RecipeError, match="differs") as caught:
        going_on(left)
    for name in ("qexport: was", "environment.torch: was", "environment.cpu_capability: was"):
        assert name in str(caught.value.where)


def test_files_that_were_only_copied_are_compared_by_their_contents(left: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(left, moved)
    _, events = told(recipe(moved, "gptq", TWO, moved / "out"))
    assert steps(events)[0] > 0


def test_restart_begins_again(left: Path) -> None:
    _, events = told(recipe(left, "gptq 3 bits", [{"layout": "safetensors"}], left / "out"), restart=True)
    assert steps(events)[0] == 0
    assert not (left / "out" / "vllm").exists()


@pytest.mark.parametrize("place", ["safetensors/model.safetensors", ".activations/activations-*"])
def test_what_the_disk_has_damaged_is_not_used(left: Path, place: str) -> None:
    for path in (left / "out.partial").glob(place):
        if path.stat().st_size:
            flipped(path, path.stat().st_size // 2)
    with pytest.raises(ResourceError, match="damaged") as caught:
        going_on(left)
    assert "--restart" in str(caught.value.mend)
    assert (left / "out.partial" / MARKER_NAME).stat().st_size


def test_a_folder_without_a_journal_is_emptied(left: Path) -> None:
    (left / "out.partial" / MARKER_NAME).write_bytes(b"")
    _, events = going_on(left)
    assert steps(events)[0] == 0


@pytest.fixture(scope="module")
def published(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with the inputs and what a run was killed at publishing, and the result that it would have had."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    result, _ = told(recipe(folder, "none", TWO, folder / "out"))
    (folder / "out").rename(folder / "out.partial")
    return folder, result


@pytest.fixture
def finished(published: tuple[Path, Result], tmp_path: Path) -> tuple[Path, Result]:
    folder, result = published
    return Path(shutil.copytree(folder, tmp_path / "finished")), result


def publishing(folder: Path, method: str = "none", **options: Any) -> tuple[Result, list[Progress | Notice]]:
    return told(recipe(folder, method, TWO, folder / "out"), **options)


def test_what_is_finished_is_only_published(finished: tuple[Path, Result]) -> None:
    folder, before = finished
    result, events = publishing(folder)
    assert [event.text for event in events if isinstance(event, Notice)][-1].startswith("publishing what")
    assert steps(events) == []
    assert (result.manifests, result.roots) == (before.manifests, before.roots)
    assert sorted(path.name for path in folder.glob("out*")) == ["out", "out.sha256"]


def without_a_file(folder: Path) -> None:
    (folder / "out.partial" / "vllm" / "README.md").unlink()


def with_another_file(folder: Path) -> None:
    (folder / "out.partial" / "vllm" / "notes.txt").touch()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flipped(folder / "out.partial" / "vllm" / "model.safetensors"),
        without_a_file,
        with_another_file,
        lambda folder: flipped(folder / "base" / "model.safetensors"),
        lambda folder: flipped(folder / "adapter" / "adapter_model.safetensors"),
    ],
    ids=["a flipped bit", "a file less", "a file more", "another base", "another adapter"],
)
def test_what_is_not_finished_or_was_made_from_something_else_is_made_anew(
    finished: tuple[Path, Result], change: Callable[[Path], None]
) -> None:
    folder, _ = finished
    change(folder)
    result, events = publishing(folder)
    assert steps(events)[0] == 0
    assert result.artifact_path == folder / "out"
    assert not (folder / "out" / "vllm" / "notes.txt").exists()


@pytest.mark.parametrize(("method", "options"), [("none float16", {}), ("none", {"restart": True})])
def test_another_recipe_or_restart_makes_it_anew(
    finished: tuple[Path, Result], method: str, options: dict[str, Any]
) -> None:
    _, events = publishing(finished[0], method, **options)
    assert steps(events)[0] == 0


def test_a_finished_run_of_another_program_is_made_anew(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "version", lambda _: "0.0.1")
    _, events = publishing(finished[0])
    assert steps(events)[0] == 0


def test_a_measured_artifact_gets_the_verdict_that_it_had(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    factories.write_text(tmp_path / "held-out.jsonl", passages=20, seed=3)
    chosen = verified(tmp_path, "out")
    before, _ = told(chosen)
    path = before.artifact_path
    path.rename(tmp_path / "out.partial")
    result, events = told(chosen)
    assert steps(events) == []
    assert (result.reports, result.verdict, result.artifact_path) == (before.reports, before.verdict, path)
    path.rename(tmp_path / "out.partial")
    appended(tmp_path / "held-out.jsonl")
    assert steps(told(chosen)[1])[0] == 0


def asked(folder: Path, **changes: Any) -> Recipe:
    values = artifact_cases.recipe(folder, "nf4", [{"layout": "safetensors"}])
    verify: dict[str, Any] = {"text": str(folder / "held-out.jsonl"), "windows": 4, "max_windows": 4, "needles": 1}
    verify |= {"sequence_length": 24, "profile": "off", "lengths": [240], "length_windows": 2}
    verify |= {
        name: {"prompts": str(folder / f"{name}.jsonl"), "max_new_tokens": 1} for name in ("formats", "refusals")
    }
    return Recipe.model_validate(values | {"verify": verify | changes, "output": str(folder / "out")})


def takes_over(chosen: Recipe) -> bool:
    planned = plan(chosen)
    found = texts.read_texts(chosen, planned.merged.checkpoint, planned.structure)
    return FinishedRun(planned, found, torch.device("cpu")).is_in(Path(str(chosen.output)))


def test_a_run_whose_suites_or_tasks_may_have_changed_is_not_taken_over(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    factories.write_text(tmp_path / "held-out.jsonl", passages=20, seed=3)
    lines = {
        "formats": '{"id": "a", "prompt": "A list.", "format": {"code": "python"}}\n',
        "refusals": '{"id": "b", "prompt": "Name a river.", "kind": "harmless"}\n',
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(line)
    chosen = asked(tmp_path)
    told(chosen)
    assert takes_over(chosen)
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(line.replace("A list", "A map").replace("river", "lake"))
        assert not takes_over(chosen), name
        (tmp_path / f"{name}.jsonl").write_text(line)
    portable = chosen.portable()
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 0}]
    task = task_files.write_task(tmp_path, rows, task_files.CHOICE)
    monkeypatch.setattr(texts, "require_harness", lambda: None)
    monkeypatch.setattr(Recipe, "portable", lambda _: portable)  # as if the finished run had these tasks too
    assert not takes_over(asked(tmp_path, tasks={"tasks": [str(task)]}))
    monkeypatch.setattr(needles, "sha256_json", lambda _: "0" * 64)  # the needles of another program
    assert not takes_over(chosen)


def verified(folder: Path, output: str, method: str = "nf4") -> Recipe:
    """A recipe whose gate stays undecided, so that windows are added until the text is used up."""
    values = artifact_cases.recipe(folder, method, [{"layout": "safetensors"}])
    verify = {"text": str(folder / "held-out.jsonl"), "windows": 8, "max_windows": 32, "sequence_length": 24}
    verify |= {"profile": "off", "gates": {"mean_kl": {"at_most": 0.4}}}
    return Recipe.model_validate(values | {"verify": verify, "output": str(folder / output)})


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_verification_goes_on_from_its_last_round_and_the_reference_is_not_measured_again(
    method: str, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    factories.write_text(tmp_path / "held-out.jsonl", seed=2)
    whole, every = told(verified(tmp_path, "whole", method))
    rounds = whole.report.protocol.looks
    assert len(rounds) > 1
    stopped(verified(tmp_path, "out", method), lambda event: event.detail == f"predictions in {rounds[1]} windows")
    second, events = told(verified(tmp_path, "out", method))
    assert not [event for event in events if isinstance(event, Progress) and event.stage == "prepare"]
    assert details(events) == details(every)[details(every).index(f"predictions in {rounds[0]} windows") + 1 :]
    one, other = (result.report.model_dump(exclude={"timings"}) for result in (whole, second))
    assert one == other


def details(events: Sequence[Progress | Notice]) -> list[str]:
    return [
        event.detail for event in events if isinstance(event, Progress) and event.stage == "verify" and event.detail
    ]


def written_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(artifact_cases.recipe(folder, "gptq", TWO) | {"output": str(folder / "out")}))
    return path


@pytest.mark.parametrize(("fault", "code"), [("SIGTERM", 130), ("SIGINT", 130), ("ENOSPC", 8)])
def test_every_stop_says_to_run_again_and_a_second_run_ends_it(
    fault: str,
    code: int,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    honest = resuming.RunJournal.note_unit

    def failing(self: resuming.RunJournal, *args: Any) -> None:
        honest(self, *args)
        if fault == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), getattr(signal, fault))

    monkeypatch.setattr(resuming.RunJournal, "note_unit", failing)
    assert main(["run", str(written_recipe(tmp_path)), "--device", "cpu"]) == code
    assert GO_ON in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(["run", str(written_recipe(tmp_path)), "--device", "cpu"]) == 0
    assert "going on where a run was interrupted" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.partial").exists()


def test_an_error_that_would_come_again_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    def tell(event: Progress | Notice) -> None:
        if isinstance(event, Progress) and event.stage == "export":
            raise NumericalError("planted")

    chosen = recipe(inputs, "none", [{"layout": "safetensors"}], tmp_path / "out")
    with pytest.raises(NumericalError, match="planted") as caught:
        run(chosen, device="cpu", progress=tell)
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []
