"""`make test-mlflow`: runs and verifications, logged by MLflow's client to a folder and to servers that fail."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import releases
from qexport.artifact.report import Report
from qexport.cli import main
from tracking_server import TrackingServer, serving

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: make test-mlflow")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture
def server() -> Iterator[TrackingServer]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one layout, whose gates passed."""
    return releases.proven(tmp_path_factory.mktemp("made")) / "vllm"


def entries(store: Path, experiment: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=str(store))
    found = client.get_experiment_by_name(experiment)
    return sorted(client.search_runs([found.experiment_id]), key=lambda run: str(run.info.run_name))


def files(run: Any) -> dict[str, bytes]:
    folder = Path(run.info.artifact_uri)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verified(artifact: Path, uri: object, *options: str) -> int:
    recipe = artifact.parent.parent / "recipe.yaml"
    return main(["verify", str(artifact), "--reference", str(recipe), "--mlflow", str(uri), *options])


def test_a_run_is_logged_layout_by_layout(tmp_path: Path) -> None:
    releases.inputs(tmp_path)
    store = tmp_path / "store"
    assert main(["run", str(tmp_path / "recipe.yaml"), "--mlflow", str(store)]) == 0
    runs = entries(store, "qexport")
    assert [run.info.run_name for run in runs] == ["out.safetensors", "out.vllm"]
    for run, layout in zip(runs, ("safetensors", "vllm"), strict=True):
        folder = tmp_path / "out" / layout
        report = Report.read(folder)
        assert run.info.status == "FINISHED"
        assert run.data.params["quantize.method"] == "w8a8"
        assert run.data.params["load.base"] == "tiny"
        for figure in report.all_figures:
            if figure.domain is None:
                assert run.data.metrics[figure.name] == figure.value
        assert run.data.metrics["limit/mean_kl"] == 5.0
        root = subprocess.run(["sha256sum", str(folder / "SHA256SUMS")], capture_output=True, text=True, check=True)
        assert run.data.tags["qexport.root"] == root.stdout.split(maxsplit=1)[0]
        assert (run.data.tags["qexport.verdict"], run.data.tags["qexport.layout"]) == ("pass", layout)
        names = ["SHA256SUMS", "report/junit.xml", "report/report.html", "report/report.json", "report/report.md"]
        assert files(run) == {name: (folder / name).read_bytes() for name in names}


def test_nothing_names_a_path_or_a_user_of_this_machine(made: Path, tmp_path: Path) -> None:
    assert verified(made, tmp_path / "store") == 0
    (run,) = entries(tmp_path / "store", "qexport")
    assert "mlflow.user" not in run.data.tags
    assert "mlflow.source.name" not in run.data.tags
    assert run.info.user_id != getpass.getuser()
    said = json.dumps([run.data.params, run.data.tags, run.data.metrics]).encode()
    for content in (said, *files(run).values()):
        assert str(tmp_path).encode() not in content
        assert str(made.parent).encode() not in content


def test_a_failed_gate_is_logged_and_keeps_its_exit_code(made: Path, tmp_path: Path) -> None:
    limits = tmp_path / "gates.yaml"
    limits.write_text("profile: 'off'\ngates: {mean_kl: {at_most: 1.0e-4}}\n")
    options = ["--gates", str(limits), "--mlflow-experiment", "notes", "--mlflow-run", "stricter"]
    assert verified(made, tmp_path / "store", *options) == 6
    (run,) = entries(tmp_path / "store", "notes")
    assert (run.info.run_name, run.info.status) == ("stricter", "FAILED")
    assert (run.data.tags["qexport.verdict"], run.data.tags["qexport.gate.mean_kl"]) == ("fail", "fail")


def test_a_server_is_told_the_same(made: Path, server: TrackingServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(made, server.uri, "--json") == 0
    captured = capsys.readouterr()
    report = Report.model_validate_json(captured.out)
    assert f"logged to MLflow: vllm in qexport, run {server.run_id}" in captured.err
    batches = [body for name, body in server.told if name == "/runs/log-batch"]
    metrics = {each["key"]: each["value"] for body in batches for each in body.get("metrics", [])}
    assert metrics["mean_kl"] == next(each.value for each in report.figures if each.name == "mean_kl")
    assert max(len(values) for body in batches for values in body.values() if isinstance(values, list)) <= 100
    assert server.told[-1][1]["status"] == "FINISHED"
    assert Report.model_validate_json(server.files["report/report.json"]) == report
    assert not any(name.endswith(".safetensors") for name in server.files)


@pytest.mark.parametrize(
    ("failing", "missing", "kept"),
    [
        ("runs/create", "everything: ", None),
        ("log-batch", "settings, figures and verdicts: ", "report/report.json"),
        ("mlflow-artifacts", "report/junit.xml", "/runs/log-batch"),
        ("runs/update", "the end of the entry: ", "report/report.json"),
    ],
)
def test_a_server_that_fails_later_changes_nothing(
    failing: str, missing: str, kept: str | None, made: Path, server: TrackingServer,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    server.failing = {failing: 500}
    assert verified(made, server.uri, "--report", str(tmp_path / "report")) == 0
    captured = capsys.readouterr()
    (said,) = [line for line in captured.err.splitlines() if "NOT logged" in line]
    assert missing in said
    assert "All 6 gates passed" in captured.out
    assert (tmp_path / "report/report.json").is_file()
    assert kept is None or kept in {*server.files, *(name for name, _ in server.told)}


@pytest.mark.parametrize(("senseless", "code"), [("runs/create", 0), ("get-by-name", 3)])
def test_an_answer_that_makes_no_sense_is_one_message(
    senseless: str, code: int, made: Path, server: TrackingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.senseless = senseless
    assert verified(made, server.uri) == code
    error = capsys.readouterr().err
    assert ("NOT logged to MLflow" in error) is (code == 0)
    assert "a defect in qexport" not in error


@pytest.mark.parametrize(
    ("failing", "stage", "code", "said"),
    [
        ({}, "", 3, "answers with the experiment '1' in the state ''"),
        ({"get-by-name": 401}, "active", 3, "the tracking server cannot be used"),
        ({"get-by-name": 507}, "active", 3, "the disk is full"),
        ({}, "deleted", 2, "the experiment was deleted"),
    ],
    ids=["no experiment", "refuses", "fails", "deleted experiment"],
)
def test_a_server_that_cannot_be_used_is_told_before_any_work(
    failing: dict[str, int], stage: str, code: int, said: str, server: TrackingServer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    releases.inputs(tmp_path)
    server.failing, server.stage = failing, stage
    assert main(["run", str(tmp_path / "recipe.yaml"), "--mlflow", server.uri]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("uri", ["store", "sqlite:///store.db", "weird://store"])
def test_a_store_that_the_client_does_not_take_is_a_wrong_option(
    uri: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    assert verified(made, uri) == 2
    assert "MLFLOW_ALLOW_FILE_STORE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_option_nothing_of_it_is_imported(made: Path) -> None:
    program = (
        "import sys; from qexport.cli import main; "
        f"code = main(['verify', {str(made)!r}, '--reference', {str(made.parent.parent / 'recipe.yaml')!r}]); "
        "sys.exit(code or any(name.partition('.')[0] == 'mlflow' for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
