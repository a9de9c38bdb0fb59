"""What an experiment tracker is told of a report, and the options for it; `make test-mlflow` has the library."""

from __future__ import annotations

import json
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reports
import rich_report
from qexport.artifact.figures import GateResult
from qexport.artifact.report import Report
from qexport.artifact.served import RuntimeFacts, ServedRecord
from qexport.cli import main
from qexport.reporting.tracked import Tracked, tracked
from reports import figure, gate_result

RECIPE = {
    "load": {"base": "./none"}, "quantize": {"method": "nf4"}, "export": [{"layout": "vllm"}], "output": "out",
}  # fmt: skip
KEY = re.compile(r"[\w\-. /]{1,250}", re.ASCII)
"""What MLflow's documentation allows for names."""


def told(report: Report, recipe: Mapping[str, Any] | None = None) -> Tracked:
    return tracked("notes", report.verdict, recipe=recipe or {}, gates=report.gates, report=report)


def test_figures_limits_and_verdicts_are_those_of_the_report() -> None:
    report = reports.report()
    entry = told(report)
    for each in report.all_figures:
        name = each.name if each.domain is None else f"{each.name}.{each.domain}"
        assert entry.metrics[name] == each.value
        low, high = each.interval
        assert (entry.metrics.get(f"low/{name}"), entry.metrics.get(f"high/{name}")) == (low, high)
    for gate in report.gates:
        assert entry.tags[f"qexport.gate.{gate.name}"] == gate.verdict
        assert entry.metrics.get(f"limit/{gate.name}") == gate.limit
    assert entry.tags["qexport.verdict"] == report.verdict
    assert entry.passed == (report.verdict == "pass")
    assert entry.tags["qexport.base_sha256"] == report.identity.base_sha256
    assert Report.model_validate_json(entry.files["report/report.json"]) == report
    assert entry.files.keys() == {f"report/{name}" for name in ("report.json", "report.html", "report.md", "junit.xml")}


def test_settings_are_flat_and_bounded() -> None:
    recipe = {
        "quantize": {"method": "gptq", "bits": 4, "sym": True, "none": None},
        "export": [{"layout": "vllm"}],
        "verify": {"text": "x" * 2000, "gates": {f"gate{number}": {"at_most": 1.0} for number in range(1000)}},
    }
    params = told(reports.report(), recipe=recipe).params
    assert params["quantize.method"] == "gptq"
    assert (params["quantize.bits"], params["quantize.sym"]) == ("4", "true")
    assert json.loads(params["export"]) == [{"layout": "vllm"}]
    assert len(params["verify.text"]) == 500
    assert len(params) == 300
    assert "quantize.none" not in params


def test_a_gate_on_a_domain_has_the_name_of_its_figure() -> None:
    gates = [gate_result("mean_kl[code]", domain="code"), gate_result(verdict="fail")]
    entry = tracked("notes", "fail", recipe={}, gates=gates, report=reports.report(gates=gates))
    assert entry.tags["qexport.gate.mean_kl.code"] == "pass"
    assert {"limit/mean_kl.code", "mean_kl.code"} <= entry.metrics.keys()
    assert entry.tags["qexport.gate.mean_kl"] == "fail"
    assert not entry.passed


def test_a_run_that_ended_before_its_report_has_its_gates() -> None:
    gate = GateResult(name="merge", figure="merge_kl", value=0.5, limit=0.1, verdict="fail", reason="too far")
    entry = tracked("notes", "fail", recipe={"load": {"base": "b"}}, gates=[gate])
    assert entry.metrics == {"merge": 0.5, "limit/merge": 0.1}
    assert entry.tags == {"qexport.verdict": "fail", "qexport.gate.merge": "fail"}
    assert (entry.params, entry.files) == ({"load.base": "b"}, {})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=300), min_size=1, max_size=4, unique=True))
def test_no_name_is_one_that_mlflow_refuses(names: list[str]) -> None:
    figures = [figure("mean_kl", 0.1), *(figure("mean_kl", 0.1, domain=name) for name in names)]
    gates = [gate_result(name=f"mean_kl[{name}]", domain=name) for name in names]
    entry = told(reports.report(figures=figures, gates=gates), recipe={"verify": dict.fromkeys(names, "a")})
    for keys in (entry.metrics, entry.params, entry.tags):
        for key in keys:
            assert KEY.fullmatch(key), key
            assert posixpath.normpath(key) == key
        assert not {key for key in keys if any(other.startswith(f"{key}/") for other in keys)}, "a file and a folder"


def test_a_large_report_is_told_within_bounds() -> None:
    entry = told(rich_report.rich_report())
    assert len(entry.metrics) < 5000
    assert all(KEY.fullmatch(key) for key in entry.metrics)
    assert max(map(len, entry.tags.values())) <= 500


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mlflow", "http://127.0.0.1:9"], "pip install 'qexport[mlflow]'"),
        (["--mlflow", "http://me:secret@127.0.0.1:9"], "MLFLOW_TRACKING_PASSWORD"),
        (["--mlflow", "https://secret@127.0.0.1:9"], "MLFLOW_TRACKING_TOKEN"),
        (["--mlflow", "http://[::1"], "this is no address"),
        (["--mlflow-experiment", "notes"], "give --mlflow URI"),
        (["--mlflow-run", "first"], "--mlflow-run needs a tracking server"),
        (["--mlflow", ""], "an option of MLflow is empty"),
    ],
    ids=["missing package", "password", "token", "malformed", "experiment alone", "name alone", "empty"],
)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_wrong_options_are_refused_before_any_work(
    options: list[str], said: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    named = [str(recipe)] if command == "run" else [str(tmp_path), "--reference", str(recipe)]
    assert main([command, *named, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "secret" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_long_names_that_begin_alike_stay_apart() -> None:
    names = [f"{'x' * 200}{end}" for end in "ab"]
    figures = [figure("mean_kl", 0.1 * number, domain=name) for number, name in enumerate(names, 1)]
    facts = RuntimeFacts(name="vLLM", version="1", kernels={}, dtype="bfloat16", arguments={})
    served = [
        ServedRecord(label=name, runtime=facts, scored="vocabulary", figures=[each], fidelity_limit=None, notes=[])
        for name, each in zip(names, [figure("mean_kl", 0.3), figure("mean_kl", 0.4)], strict=True)
    ]
    gates = [gate_result(name=f"mean_kl[{name}]", domain=name) for name in names]
    report = reports.report(figures=figures, gates=gates).model_copy(update={"served": served})
    entry = told(report, recipe=dict.fromkeys(names, "a"))
    assert {0.1, 0.2, 0.3, 0.4} <= set(entry.metrics.values())
    assert len([key for key in entry.params if key.startswith("xxx")]) == 2
    assert len([key for key in entry.tags if key.startswith("qexport.gate.mean_kl.x")]) == 2
    assert all(KEY.fullmatch(key) for key in [*entry.metrics, *entry.params, *entry.tags])
