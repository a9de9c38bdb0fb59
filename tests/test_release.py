"""`qexport release`: what it makes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import releases
import reports
from qexport import load
from qexport.artifact.agreement import verification_of
from qexport.artifact.digests import sha256_json
from qexport.artifact.integrity import open_artifact, write_listing
from qexport.artifact.manifest import Manifest
from qexport.artifact.measurements import TaskRecord
from qexport.artifact.partial import MARKER_NAME
from qexport.artifact.report import Report
from qexport.artifact.served import RuntimeFacts, ServedRecord, through
from qexport.cli import main
from qexport.export.vllm.launch import VllmLaunch
from qexport.pipeline.inspection import inspect_artifact
from qexport.registries import Destination, Package, Published, publish
from qexport.release.evaluation import evaluation_results
from qexport.release.launching import released_launch
from qexport.reporting.writing import write_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact of two layouts in `out`, its inputs, and a key."""
    folder = tmp_path_factory.mktemp("made")
    releases.proven(folder)
    releases.key(folder)
    return folder


@pytest.fixture(scope="module")
def released(made: Path) -> Path:
    """The folder with both releases."""
    assert run_release(made / "out", made / "releases", "--sign", str(made / "release.key")) == 0
    return made / "releases"


def run_release(artifact: Path, to: Path, *options: str) -> int:
    return main(["release", str(artifact), "--to", str(to), "--version", releases.VERSION, *options])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edited(folder: Path, **changes: Any) -> None:
    """The artifact as if its run had written other values into the manifest."""
    manifest = Manifest.read(folder).model_copy(update=changes)
    manifest.write(folder)
    write_listing(folder, manifest)


def copied(made: Path, tmp_path: Path, layout: str = "safetensors") -> Path:
    return Path(shutil.copytree(made / "out" / layout, tmp_path / "artifact"))


def test_each_layout_becomes_a_release_of_one_name_and_version(released: Path) -> None:
    assert {path.name for path in released.iterdir() if path.is_dir()} == {
        "tiny-notes-1.4.0+w8a8", "tiny-notes-1.4.0+w8a8.vllm",
    }  # fmt: skip
    record = read(released / "tiny-notes-1.4.0+w8a8.vllm" / "release.json")
    assert (record["model"], record["version"], record["method"]) == ("tiny-notes", "1.4.0", "w8a8")
    assert record["served_as"] == "tiny-notes-1-4-0-w8a8-vllm"
    assert record["proof"]["verdict"] == "pass"


def test_the_artifact_is_not_changed_and_everything_but_words_is_taken_over(made: Path, released: Path) -> None:
    source, own = made / "out" / "vllm", released / "tiny-notes-1.4.0+w8a8.vllm"
    open_artifact(source)
    before, after = files(source), files(own)
    rewritten = {"README.md", "SHA256SUMS", "qexport-manifest.json"}
    for name, content in before.items():
        assert name in rewritten or name.startswith("launch/") or after[name] == content
    added = {name for name in after if name not in before and not name.startswith("launch/")}
    evidence = {"evidence/bom.cdx.json", "evidence/provenance.json", "evidence/requirements.txt"}
    assert added == evidence | {"release.json", "model.sig"}


def test_it_is_an_artifact_like_any_other(released: Path) -> None:
    folder = released / "tiny-notes-1.4.0+w8a8"
    assert inspect_artifact(folder).report == "as in the manifest"
    assert load(folder).config.model_type == "llama"
    sums = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    assert sums.returncode == 0


def test_the_bytes_are_the_same_each_time_but_for_the_signature(made: Path, released: Path, tmp_path: Path) -> None:
    assert run_release(made / "out" / "vllm", tmp_path / "a b", "--sign", str(made / "release.key")) == 0
    first, second = (
        files(released / "tiny-notes-1.4.0+w8a8.vllm"),
        files(tmp_path / "a b" / "tiny-notes-1.4.0+w8a8.vllm"),
    )
    assert first.pop("model.sig") != second.pop("model.sig")
    assert first == second


def test_no_path_of_the_machine_and_no_key_is_in_it(made: Path, released: Path) -> None:
    secret = "".join((made / "release.key").read_text().splitlines()[1:3]).encode()
    for name, content in files(released).items():
        assert str(made).encode() not in content, name
        assert secret not in content, name
        assert b"qexport-release-" not in content, name


def test_launch_files_carry_the_released_name(released: Path) -> None:
    folder = released / "tiny-notes-1.4.0+w8a8.vllm" / "launch"
    name, label = "tiny-notes-1.4.0+w8a8.vllm", "tiny-notes-1-4-0-w8a8-vllm"
    assert f"--served-model-name {name}" in (folder / "vllm-serve.sh").read_text()
    assert YAML(typ="safe").load((folder / "kserve.yaml").read_text())["metadata"]["name"] == label
    assert [path.name for path in (folder / "triton").iterdir()] == [label]
    assert "VERSION" not in (folder / "README.md").read_text()


def test_the_card_has_the_hubs_metadata_and_says_what_is_missing(released: Path) -> None:
    text = (released / "tiny-notes-1.4.0+w8a8.vllm" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = YAML(typ="safe").load(front)
    assert (data["license"], data["language"], data["library_name"]) == ("apache-2.0", ["en", "fr"], "vllm")
    assert (data["pipeline_tag"], data["quantized_by"]) == ("text-generation", "qexport")
    [result] = data["model-index"][0]["results"]
    assert {"mean_kl", "top1_agreement"} <= {metric["type"] for metric in result["metrics"]}
    assert "**notes names no license" in body
    assert "| mean KL divergence |" in body
    assert "Requests name the model `tiny-notes-1.4.0+w8a8.vllm`" in body
    assert "[licenses/base/NOTICE](licenses/base/NOTICE)" in body


def test_an_existing_release_is_never_replaced(made: Path, released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(released)
    assert run_release(made / "out", released) == 2
    assert "something is there already, and a release is never replaced" in capsys.readouterr().err
    assert files(released) == before


@pytest.mark.parametrize(
    "point", ["release.making.digest_files", "registries.arrival.sync_tree", "release.making.recording_roots"]
)
def test_a_failure_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"qexport.{point}", fail)
    assert run_release(made / "out" / "safetensors", tmp_path / "to") == 130
    assert list((tmp_path / "to").iterdir()) == []


def test_no_release_is_made_if_one_of_several_places_is_taken(made: Path, tmp_path: Path) -> None:
    (tmp_path / "to" / "tiny-notes-1.4.0+w8a8.vllm").mkdir(parents=True)
    assert run_release(made / "out", tmp_path / "to") == 2
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["tiny-notes-1.4.0+w8a8.vllm"]


def test_a_taken_tar_file_is_refused_before_the_artifact_is_read(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.release.releasing.prove", lambda *_, **__: pytest.fail("the artifact was read"))
    (tmp_path / "release.tar").touch()
    assert run_release(made / "out" / "vllm", tmp_path / "release.tar") == 2
    assert "something is there already" in capsys.readouterr().err


def test_a_release_inside_an_artifact_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(made, tmp_path)
    for to in (artifact, artifact / "launch" / "deep", artifact / "release.tar"):
        assert run_release(artifact, to) == 2
        assert "the release's place is inside an artifact" in capsys.readouterr().err
    open_artifact(artifact)


def test_what_is_made_for_a_push_is_no_layouts_neighbour_and_leftovers_of_a_kill_are_removed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "out", tmp_path / "a" / "out")
    before, left = sorted((tmp_path / "a" / "out").iterdir()), tmp_path / "a" / ".out.killed.inputs"
    left.mkdir()
    (left / MARKER_NAME).touch()
    (left / "model.safetensors").write_bytes(b"x")
    found = list[Path]()

    def looked(package: Package, place: Destination, **_: Any) -> Published:
        found.append(package.folder)
        assert not left.exists()
        assert sorted((tmp_path / "a" / "out").iterdir()) == before
        return publish(package, place)

    monkeypatch.setattr("qexport.release.releasing.publish", looked)
    assert run_release(tmp_path / "a" / "out" / "vllm", tmp_path / "to" / "release.tar") == 0
    assert found[0].parent.parent == tmp_path / "a"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def refused(capsys: pytest.CaptureFixture[str], artifact: Path, to: Path, code: int, *options: str) -> str:
    assert run_release(artifact, to, *options) == code
    assert not to.exists() or list(to.iterdir()) == []
    return capsys.readouterr().err


def test_a_changed_byte_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copied(made, tmp_path)
    content = bytearray((artifact / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (artifact / "model.safetensors").write_bytes(content)
    words = refused(capsys, artifact, tmp_path / "to", 3, "--allow-unproven", "no matter")
    assert "has changed since it was written" in words


def failing(artifact: Path, verdict: str) -> None:
    report = Report.read(artifact)
    gates = [*report.gates[:-1], report.gates[-1].model_copy(update={"verdict": verdict, "passed": False})]
    report = report.model_copy(update={"gates": gates, "verdict": verdict})
    write_report(report, artifact / "report")
    edited(artifact, verification=verification_of(report))


@pytest.mark.parametrize(("verdict", "code", "words"), [("fail", 6, "are failed"), ("undecided", 7, "are undecided")])
def test_gates_that_did_not_pass_are_refused_unless_the_card_says_why(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verdict: str, code: int, words: str
) -> None:
    artifact = copied(made, tmp_path)
    failing(artifact, verdict)
    assert words in refused(capsys, artifact, tmp_path / "to", code)
    assert run_release(artifact, tmp_path / "to", "--allow-unproven", "the customer *wants* it") == 0
    card = (tmp_path / "to" / "tiny-notes-1.4.0+w8a8" / "README.md").read_text()
    assert "> **Not proven.**" in card
    assert "the customer \\*wants\\* it" in card
    assert main(["check", str(tmp_path / "to" / "tiny-notes-1.4.0+w8a8")]) == 0
    assert "NOT PROVEN: the customer *wants* it" in capsys.readouterr().out


def test_a_check_refuses_failed_gates_that_a_release_does_not_admit(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = copied(made, tmp_path)
    failing(artifact, "fail")
    monkeypatch.setattr("qexport.release.proof._doubt", lambda *_: None)
    assert run_release(artifact, tmp_path / "to") == 0
    assert main(["check", str(tmp_path / "to" / "tiny-notes-1.4.0+w8a8")]) == 6
    assert "its gates did not all pass" in capsys.readouterr().err


def test_a_missing_proof_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copied(made, tmp_path)
    shutil.rmtree(artifact / "report")
    assert "there is no proof" in refused(capsys, artifact, tmp_path / "to", 7)
    assert "the reason is empty" in refused(capsys, artifact, tmp_path / "to", 2, "--allow-unproven", " ")
    assert run_release(artifact, tmp_path / "to", "--allow-unproven", "measured elsewhere") == 0
    assert main(["check", str(tmp_path / "to" / "tiny-notes-1.4.0+w8a8")]) == 0


def test_a_name_that_may_move_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = copied(made, tmp_path)
    report, manifest = Report.read(artifact), Manifest.read(artifact)
    base = manifest.base.model_copy(update={"kind": "hub", "name": "org/tiny", "revision": "main"})
    report = report.model_copy(update={"reference": report.reference.model_copy(update={"base": base})})
    write_report(report, artifact / "report")
    edited(artifact, base=base, verification=verification_of(report))
    words = refused(capsys, artifact, tmp_path / "to", 3, "--allow-unproven", "no matter")
    assert "org/tiny was loaded by a name that may move" in words
    commit = base.model_copy(update={"revision": "0123456789" * 4})
    report = report.model_copy(update={"reference": report.reference.model_copy(update={"base": commit})})
    write_report(report, artifact / "report")
    edited(artifact, base=commit, verification=verification_of(report))
    assert run_release(artifact, tmp_path / "to") == 0
    card = (tmp_path / "to" / "tiny-notes-1.4.0+w8a8" / "README.md").read_text()
    assert "base_model:\n- org/tiny\n" in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--version", "1+2"], "no version"),
        (["--version", "../1"], "no version"),
        (["--name", "Big Model"], "no name of a release"),
        (["--name", "-x"], "no name of a release"),
        (["--sign", "nothing.key"], "the key cannot be read"),
    ],
)
def test_what_cannot_be_a_name_or_a_key_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["release", str(made / "out" / "vllm"), "--to", str(tmp_path / "to"), "--version", "1", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_a_version_is_needed_and_the_recipe_may_name_it(made: Path, tmp_path: Path) -> None:
    assert main(["release", str(made / "out" / "vllm"), "--to", str(tmp_path / "to")]) == 2
    artifact = copied(made, tmp_path)
    recipe = Manifest.read(artifact).recipe | {"release": {"name": "notes", "version": "2.0"}}
    edited(artifact, recipe=recipe, recipe_sha256=sha256_json(recipe))
    assert main(["release", str(artifact), "--to", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to" / "notes-2.0+w8a8").is_dir()


def test_a_run_with_a_version_is_released_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = releases.key(tmp_path)
    told = {"name": "notes", "version": "3.0", "to": "releases", "sign": "release.key"}
    releases.inputs(tmp_path, release=told)
    assert main(["run", str(tmp_path / "recipe.yaml"), "release.sign=nothing.key"]) == 2
    assert "the key cannot be read" in capsys.readouterr().err
    for to, words in (
        (f"{tmp_path / 'out' / 'releases'}", "inside the artifact"),
        (f"{tmp_path / 'releases'}", "is there already"),
    ):
        (tmp_path / "releases" / "notes-3.0+w8a8.vllm").mkdir(parents=True, exist_ok=True)
        assert main(["run", str(tmp_path / "recipe.yaml"), f"release.to={to}"]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "releases" / "notes-3.0+w8a8.vllm").rmdir()
    assert main(["run", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    folder = tmp_path / "releases" / "notes-3.0+w8a8"
    assert main(["check", str(folder), "--signature", str(public)]) == 0
    recipe = Manifest.read(folder).recipe
    assert recipe["release"] == {"name": "notes", "version": "3.0"}
    assert private.name not in (folder / "qexport-manifest.json").read_text()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [([], "bfloat16"), (["float16"], "float16"), (["float16", "bfloat16"], "bfloat16"), (["bfloat16"], "bfloat16")],
)
def test_vllm_starts_in_the_one_dtype_that_confirmed_it(made: Path, dtypes: list[str], expected: str) -> None:
    served, gates = list[ServedRecord](), list[Any]()
    for dtype in dtypes:
        facts = RuntimeFacts(name="vLLM", version="0.32", kernels={}, dtype=dtype, arguments={})
        record = ServedRecord(
            label=f"vllm {dtype}", runtime=facts, scored="token", figures=[], fidelity_limit=None, notes=[]
        )
        served.append(record)
        gates.append(reports.gate_result(name=through("mean_kl", record.label)))
    report = reports.report(gates=gates or None, served=served)
    launch = released_launch(Manifest.read(made / "out" / "vllm"), "x", report)
    assert isinstance(launch, VllmLaunch)
    assert launch.dtype == expected


def test_neither_a_release_nor_a_foreign_folder_is_released(
    made: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "release already" in refused(capsys, released / "tiny-notes-1.4.0+w8a8", tmp_path / "to", 3)
    assert main(["release", str(made / "tiny"), "--to", str(tmp_path / "to"), "--version", "1"]) == 3


def test_weights_are_linked_and_small_files_copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.release.making._LINKED_BYTES", 100_000)
    source = made / "out" / "safetensors"
    assert run_release(source, tmp_path / "to") == 0
    own = tmp_path / "to" / "tiny-notes-1.4.0+w8a8"
    assert (own / "model.safetensors").samefile(source / "model.safetensors")
    assert not (own / "config.json").samefile(source / "config.json")


def test_only_the_hubs_benchmarks_go_into_its_own_form() -> None:
    task = dict(
        metric="acc", num_fewshot=0, sha256="a" * 64, items=100, reference_accuracy=0.5, artifact_accuracy=0.49,
        only_reference=2, only_artifact=1, p_value=1.0,
    )  # fmt: skip
    report = reports.report()
    tasks = [TaskRecord.model_validate({"task": name, **task}) for name in ("arc_easy", "own")]
    found = YAML(typ="safe").load(evaluation_results(report.model_copy(update={"tasks": tasks})))
    assert [(each["dataset"], each["value"]) for each in found] == [
        ({"id": "allenai/ai2_arc", "task_id": "ARC-Easy"}, 0.49)
    ]
    assert evaluation_results(report) == ""
