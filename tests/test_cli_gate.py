from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qexport.artifact.figures import CheckResult
from qexport.artifact.report import Report
from qexport.cli import main
from qexport.errors import InputError
from reports import report, written


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """An artifact's folder with the report of a sound artifact."""
    (tmp_path / "artifact" / "report").mkdir(parents=True)
    written(tmp_path / "artifact" / "report")
    return tmp_path / "artifact"


def gates(folder: Path, text: str) -> str:
    path = folder / "gates.yaml"
    path.write_text(text)
    return str(path)


def test_gates_that_pass_end_with_0_and_their_table(
    measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["gate", str(measured), "--gates", gates(measured, "profile: auto")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["mean_kl", "passed", "0.161", "nats", "[0.153,", "0.169]", "≤", "0.25", "38"] in rows
    assert ["top1_agreement", "passed", "79.3%", "[77.3,", "81.3]", "≥", "72%", "38"] in rows


def test_a_failed_gate_ends_with_6(
    measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    limits = gates(measured, "gates: {mean_kl: {at_most: 0.1}, top1_agreement: {at_least: 0.79}}")
    assert main(["gate", str(measured / "report" / "report.json"), "--gates", limits]) == 6
    captured = capsys.readouterr()
    lines = [line.strip() for line in captured.out.splitlines()]
    assert "mean_kl: lies at 0.153 to 0.169, none of it at most 0.1" in lines
    assert any(line.startswith("top1_agreement: lies at 0.773 to 0.813, part of it at least 0.79") for line in lines)
    assert captured.err.splitlines() == [
        "error: 1 gate failed: mean_kl is 0.161 where the limit is at most 0.1",
        f"where: {measured}/report/report.json",
        "mend:  try more bits or a smaller group_size, or loosen the limit where the use allows it",
    ]


def test_an_undecided_gate_ends_with_7(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = gates(measured, "gates: {mean_kl: {domains: {law: {at_most: 0.3}}}, chrf: {at_least: 48}}")
    assert main(["gate", str(measured), "--gates", limits]) == 7
    assert capsys.readouterr().err.splitlines()[0] == (
        "error: 2 gates could not be decided: mean_kl[law] (not measured), chrf is 48 where the limit is at least 48"
    )


def test_json_is_one_document_with_every_gate(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = gates(measured, "profile: 'off'\ngates: {mean_kl: {at_most: 0.1}}")
    assert main(["gate", str(measured), "--gates", limits, "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "fail"
    assert [note.partition(" is not set")[0] for note in document["notes"]] == [
        "the gate adapter", "the gate better_than_rtn",
    ]  # fmt: skip
    assert [(gate["name"], gate["verdict"]) for gate in document["gates"]] == [
        ("config", "pass"),
        ("tokenizer", "pass"),
        ("merge", "pass"),
        ("mean_kl", "fail"),
    ]


def test_of_many_gates_the_first_are_named(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = ", ".join(f"d{number}: {{at_most: 0.3}}" for number in range(2000))
    limits = gates(measured, f"profile: 'off'\ngates: {{mean_kl: {{domains: {{{domains}}}}}}}")
    assert main(["gate", str(measured), "--gates", limits, "--json"]) == 7
    assert capsys.readouterr().err.splitlines()[0].endswith("mean_kl[d11] (not measured), and 1988 more")


def test_the_mend_is_that_of_the_gate_that_failed(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [CheckResult(gate="tokenizer", name="ids", passed=False, detail="others")]
    written(measured / "report", report(checks=checks))
    assert main(["gate", str(measured), "--gates", gates(measured, "profile: auto")]) == 6
    assert "mend:  copy the tokenizer's files from the base" in capsys.readouterr().err.splitlines()


def test_a_moved_limit_is_noted_on_stderr(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = [
        each.model_copy(update={"noise_floor": 0.004} if each.name == "mean_kl" else {}) for each in report().figures
    ]
    written(measured / "report", report(figures=noisy))
    assert main(["gate", str(measured), "--gates", gates(measured, "profile: gptq-8bit")]) == 6
    captured = capsys.readouterr()
    note = "note: the limit of mean_kl is 0.012, not the profile's 0.01: three times the noise floor"
    assert captured.err.splitlines()[0] == note


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("gates: {mean_kll: {at_most: 1}}", 2, "gates.yaml:1: gates.mean_kll: unknown figure"),
        ("gates: {mean_kl: {at_most: 0.0001}}", 2, "limits are tighter than three times the noise floor"),
        ("", 2, "the file of gates is empty"),
    ],
)
def test_gates_that_cannot_be_asked_for_end_with_2(
    measured: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, what: str
) -> None:
    assert main(["gate", str(measured), "--gates", gates(measured, text)]) == code
    assert what in capsys.readouterr().err


def test_a_report_that_is_not_there_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(tmp_path / "nothing"), "--gates", gates(tmp_path, "profile: tiny")]) == 3
    assert "the report cannot be read" in capsys.readouterr().err


def test_without_gates_the_command_says_what_is_missing(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(measured)]) == 2
    assert "--gates" in capsys.readouterr().err


def test_deciding_again_needs_no_torch(measured: Path) -> None:
    arguments = ["gate", str(measured), "--gates", gates(measured, "profile: auto")]
    code = (
        f"import sys; from qexport.cli import main; main({arguments!r}); print({{'torch', 'numpy'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_report_is_left_as_it_is(measured: Path) -> None:
    before = (measured / "report" / "report.json").read_bytes()
    main(["gate", str(measured), "--gates", gates(measured, "gates: {mean_kl: {at_most: 0.1}}")])
    assert (measured / "report" / "report.json").read_bytes() == before


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_report_with_what_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"value": 0.161', f'"value": {value}'))
    with pytest.raises(InputError):
        Report.read(path)
