"""Reports that fit the schema and cannot be true, and files that are no report at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qexport.artifact.digests import sha256_json
from qexport.artifact.report import Report
from qexport.cli import main
from qexport.errors import InputError
from reports import baseline_record, document_sums, report, written
from rich_report import rich_report

Content = dict[str, Any]


def mean_kl(content: Content) -> Content:
    return next(figure for figure in content["figures"] if figure["name"] == "mean_kl" and figure["domain"] is None)


def twice(content: Content) -> None:
    content["figures"].append(mean_kl(content) | {"value": 9.0, "sequence_low": 8.0, "sequence_high": 10.0})


def twice_with_speed(content: Content) -> None:
    content["timings"]["figures"].append(dict(mean_kl(content)))


FAULTS: dict[str, tuple[Callable[[Content], object], str]] = {
    "a figure twice": (twice, "mean_kl: is listed more than once"),
    "a figure among the timings too": (twice_with_speed, "mean_kl: is listed more than once"),
    "a figure of no catalogue": (lambda c: mean_kl(c).update(name="mean_kll"), "mean_kll: unknown figure"),
    "fewer than no units": (lambda c: mean_kl(c).update(n=-5), "mean_kl: measured on -5 units"),
    "an interval the wrong way round": (lambda c: mean_kl(c).update(low=9.0, high=1.0), "an interval from 9 to 1"),
    "a sequence the wrong way round": (lambda c: mean_kl(c).update(sequence_low=9.0), "an interval from 9 to "),
    "no bins": (lambda c: c["kl_histogram"].update(edges=[], counts=[]), "kl_histogram"),
    "bins that do not rise": (lambda c: c["kl_histogram"].update(edges=[1.0, 1.0], counts=[5]), "kl_histogram"),
    "a bin more than edges allow": (lambda c: c["kl_histogram"]["counts"].append(1), "kl_histogram"),
    "fewer than no tokens in a bin": (lambda c: c["kl_histogram"]["counts"].__setitem__(0, -1), "kl_histogram"),
    "a divergence below 0": (lambda c: c["kl_histogram"]["edges"].__setitem__(0, -1.0), "kl_histogram"),
    "fewer than no tokens": (lambda c: mean_kl(c).update(tokens=-1), "units and -1 tokens"),
    "fewer than no flips": (lambda c: c["flips_by_margin"][0].update(flips=-1), "flips_by_margin"),
    "more flips than tokens": (lambda c: c["flips_by_margin"][0].update(flips=10**6), "flips_by_margin"),
    "an error below 0": (lambda c: c["block_drift"][0].update(relative_error=-1.0), "block_drift"),
    "5 bits": (lambda c: c["layers"][0].update(bits=5), "q_proj: 5 bits"),
    "a loss below 0": (lambda c: c["layers"][0].update(loss=-1.0), "q_proj: a loss"),
    "a loss of rounding below 0": (lambda c: c["layers"][0].update(rtn_loss=-1.0), "q_proj: a loss"),
    "a damping below 0": (lambda c: c["layers"][0].update(damp_percent=-1.0), "q_proj: a loss or damping"),
    "no bits": (lambda c: c["subject"]["sizes"].update(bits_per_weight=0.0), "subject: a size"),
    "no bytes": (lambda c: c["subject"]["sizes"].update(total_bytes=0), "subject: a size"),
    "a reference of no bytes": (lambda c: c["subject"].update(reference_bytes=0), "subject: a size"),
    "no parameters": (lambda c: c["subject"]["sizes"].update(parameters=0), "subject: a size"),
    "another verdict": (lambda c: c.update(verdict="fail"), "verdict: fail, but its gates give pass"),
    "passed without an end": (lambda c: c["gates"][0].update(high=None), "passed without a measured value"),
    "passed without a limit": (lambda c: c["gates"][0].update(limit=None), "passed without a measured value"),
    "sums of another number of windows": (lambda c: c["document_sums"]["parts"].pop(), "lists of different lengths"),
    "sums of another number of parts": (lambda c: c["document_sums"]["kl"].pop(), "lists of different lengths"),
    "a part without tokens": (lambda c: c["document_sums"]["tokens"].__setitem__(0, 0), "a part without tokens"),
    "a window without parts": (lambda c: c["document_sums"]["parts"].__setitem__(slice(2), [3, 0]), "a part without"),
    "a part with a divergence below 0": (lambda c: c["document_sums"]["kl"].__setitem__(0, -1.0), "a divergence below"),
    "more decisive flips than flips": (lambda c: c["document_sums"]["changed"].__setitem__(0, 0), "more flips than"),
    "more flips than tokens in a part": (
        lambda c: c["document_sums"]["changed"].__setitem__(0, 999),
        "more flips than",
    ),
    "sums that give another mean": (lambda c: c["document_sums"]["kl"].__setitem__(0, 9.0), "but the figure is 0.161"),
    "no margin": (lambda c: c["baseline"].update(margin=0.0), "baseline: a margin"),
    "a release of no perplexity": (
        lambda c: c["baseline"].update(perplexity_ratio=0.0),
        "baseline: a margin or a ratio",
    ),
    "a release that agrees too often": (lambda c: c["baseline"].update(top1_agreement=1.1), "baseline: a share"),
    "passed on nothing": (lambda c: c["gates"][0].update(value=None), "passed without a measured value"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_report_that_contradicts_itself_is_refused_by_every_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    change, words = FAULTS[fault]
    content = json.loads(report(document_sums=document_sums(), baseline=baseline_record()).to_json())
    change(content)
    path = written(tmp_path)
    path.write_text(json.dumps(content))
    (tmp_path / "gates.yaml").write_text("profile: tiny")
    for command in (["gate", str(path), "--gates", str(tmp_path / "gates.yaml")], ["report", str(path)]):
        assert main(command) == 3
        message = capsys.readouterr().err
        assert "the report contradicts itself" in message
        assert words in message


def test_a_report_of_another_version_is_not_called_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have figures that this one does not know."""
    content = json.loads(report().to_json()) | {"qexport_version": "99.0"}
    next(iter(FAULTS.values()))[0](content)
    path = written(tmp_path)
    path.write_text(json.dumps(content))
    assert main(["report", str(path)]) == 3
    assert "qexport 99.0 wrote it: read it with that version" in capsys.readouterr().err


def test_what_qexport_writes_does_not_contradict_itself() -> None:
    assert report().contradictions() == rich_report().contradictions() == []


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 10**5, f'{{"n": {"9" * 5000}}}', '{"schema_version": 1, "schema_version": 1}'],
    ids=["lists in lists", "objects in objects", "too many digits", "a key twice"],
)  # fmt: skip
def test_json_that_cannot_be_a_report_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not JSON"):
        Report.read(path)


def test_a_path_that_no_system_takes_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Report.read(Path("a" * 5000))


ADDED = {
    "served_in",
    "finished",
    "profile",
    "formats",
    "refusals",
    "needles",
    "weights",
    "served",
    "source",
    "room",
    "smallest_drop",
    "document_sums",
    "baseline",
}


def test_a_report_of_an_earlier_version_keeps_its_bytes_and_its_digest(tmp_path: Path) -> None:
    """It has none of the keys that were added since, and the manifest records its digest."""
    content = json.loads(report().to_json())
    assert keys(content).isdisjoint(ADDED)
    written = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (tmp_path / "report.json").write_text(written, encoding="utf-8")
    read = Report.read(tmp_path)
    assert read.to_json() == written
    assert read.digest() == sha256_json({key: value for key, value in content.items() if key != "timings"})


def keys(content: Any) -> set[str]:
    match content:
        case dict():
            return content.keys() | set().union(*map(keys, content.values()))
        case list():
            return set().union(*map(keys, content))
        case _:
            return set()
