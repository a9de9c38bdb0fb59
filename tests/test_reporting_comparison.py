"""Several reports side by side: who may be compared, and who is on the front."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import reports
from qexport.artifact.manifest import Sizes
from qexport.artifact.report import Report, report_schema
from qexport.cli import main
from qexport.errors import InputError
from qexport.reporting.comparison import ArtifactComparison, compare, comparison_html, comparison_markdown

ROOT = Path(__file__).parents[1]
METHODS = {"NF4": (95, 0.42), "GPTQ 4-bit": (119, 0.161), "LLM.int8": (170, 0.0011), "GPTQ 8-bit": (182, 0.004)}


def artifact(megabytes: int, drift: float, method: str = "GPTQ 4-bit", **changes: Any) -> Report:
    sizes = Sizes(parameters=134_515_008, total_bytes=megabytes * 10**6, bits_per_weight=megabytes * 8e6 / 134_515_008)
    subject = reports.subject().model_copy(update={"sizes": sizes, "method": method})
    others = [figure for figure in reports.figures() if figure.name != "mean_kl"]
    figures = [reports.figure("mean_kl", drift, half=drift / 10), *others]
    return reports.report(subject=subject, **{"figures": figures, **changes})


def of_every_method() -> ArtifactComparison:
    return compare([artifact(size, drift, method) for method, (size, drift) in METHODS.items()])


def test_artifacts_that_another_beats_are_not_on_the_front() -> None:
    comparison = of_every_method()
    assert [entry.label for entry in comparison.entries] == ["NF4", "GPTQ 4-bit", "LLM.int8", "GPTQ 8-bit"]
    assert [entry.label for entry in comparison.front] == ["NF4", "GPTQ 4-bit", "LLM.int8"]


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.1, 0.2, 0.3, 0.4])), min_size=1, max_size=7))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, float]]) -> None:
    comparison = compare([artifact(size, drift) for size, drift in points])
    for entry in comparison.entries:
        mine = (entry.total_bytes // 10**6, entry.mean_kl.value)
        better = [p for p in points if p[0] <= mine[0] and p[1] <= mine[1] and p != mine]
        assert entry.on_front == (not better)
    assert len({entry.label for entry in comparison.entries}) == len(points)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": reports.identity(text_sha256="9" * 64)}, ["text_sha256", "333333333333", "999999999999"]),
        ({"identity": reports.identity(adapter_sha256=None)}, ["adapter_sha256", "none"]),
        ({"protocol": reports.protocol(sequence_length=256)}, ["sequence_length", "512", "256"]),
        ({"protocol": reports.protocol(dtype="bfloat16")}, ["dtype", "float32", "bfloat16"]),
    ],
)
def test_reports_of_other_digests_or_another_protocol_are_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        compare([artifact(1, 0.1), artifact(2, 0.2), artifact(3, 0.3, **changes)])
    for word in [*named, "report 1", "report 3"]:
        assert word in (refused.value.where or "")
    assert "report 2" not in (refused.value.where or "")


def test_continuations_of_other_lengths_are_not_compared() -> None:
    first = artifact(1, 0.1)
    assert first.generations is not None
    longer = first.generations.model_copy(update={"max_new_tokens": 7})
    with pytest.raises(InputError) as refused:
        compare([first, artifact(2, 0.2, generations=longer)])
    assert "max_new_tokens" in (refused.value.where or "")
    compare([first, artifact(2, 0.2, generations=None)])


def test_more_windows_are_no_other_protocol() -> None:
    assert len(compare([artifact(1, 0.1), artifact(2, 0.2, protocol=reports.protocol(windows=76))]).entries) == 2


def test_a_report_without_mean_kl_is_refused() -> None:
    with pytest.raises(InputError, match="no mean KL"):
        compare([artifact(1, 0.1), artifact(2, 0.2, figures=[])])


def test_the_page_draws_every_artifact_and_joins_the_front() -> None:
    page = comparison_html(of_every_method())
    assert len(re.findall(r'<circle[^>]* class="point"', page)) == 3
    assert len(re.findall(r'<circle[^>]* class="beaten"', page)) == 1
    assert re.search(r'<path d="M[\d. ]+(H[\d.]+V[\d.]+){2}" class="front"', page)
    assert page == comparison_html(of_every_method())
    for label in ("95 MB", "170 MB", "0.00110 nats", "7.08"):
        assert label in page


def test_one_artifact_of_drift_zero_can_be_drawn() -> None:
    assert "<svg" in comparison_html(compare([artifact(1, 0.0), artifact(1, 0.0)]))


def test_markdown_and_json_say_the_same() -> None:
    comparison = of_every_method()
    document = json.loads(json.dumps(comparison.as_dict()))
    assert [each["pareto_front"] for each in document["artifacts"]] == [True, True, True, False]
    assert document["artifacts"][0]["figures"]["mean_kl"]["value"] == 0.42
    text = comparison_markdown(comparison)
    assert [line.split(" | ")[2] for line in text.splitlines() if "MB" in line] == ["on it", "on it", "on it", ""]


# --- the command line ---


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    found = []
    for name, (size, drift) in METHODS.items():
        (tmp_path / name).mkdir()
        reports.written(tmp_path / name, artifact(size, drift, name))
        found.append(str(tmp_path / name))
    return found


def test_the_command_compares(folders: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", *folders, "--html", str(page)]) == 0
    assert "GPTQ 8-bit" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", *folders, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["artifacts"]) == 4
    assert main(["report", *folders, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### Artifacts compared")


def test_the_command_shows_one_report(folders: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", folders[0], "--html", str(page)]) == 0
    assert "Passed" in capsys.readouterr().out
    assert 'id="verdict"' in page.read_text(encoding="utf-8")
    assert main(["report", folders[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == Report.read(Path(folders[0])).model_dump(mode="json")


def test_a_page_is_replaced_only_on_request(
    folders: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main(["report", folders[0], "--html", str(page)]) == 2
    assert page.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main(["report", folders[0], "--html", str(page), "--force"]) == 0
    assert page.read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize("target", ["", "missing/page.html"])
def test_a_page_needs_a_place(target: str, folders: list[str], tmp_path: Path) -> None:
    assert main(["report", folders[0], "--html", str(tmp_path / target)]) == 2


def test_problems_have_their_exit_codes(folders: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    reports.written(other, artifact(1, 0.1, identity=reports.identity(base_sha256="9" * 64)))
    assert main(["report", folders[0], str(other)]) == 3
    assert main(["report", str(tmp_path / "none.json")]) == 3
    assert main(["report", folders[0], "--json", "--markdown"]) == 2
    assert main(["report"]) == 2


def test_names_of_artifacts_cannot_format_the_terminal(folders: list[str]) -> None:
    from qexport.reporting.comparison import comparison_table

    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(compare([artifact(1, 0.1, "[red]a\x1b[0m"), artifact(2, 0.2)])))
    assert "[red]a␛[0m" in capture.get()


def test_the_published_schema_is_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "report"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8")
    assert report_schema()["properties"]["verdict"]
    assert main(["schema", "nothing"]) == 2
