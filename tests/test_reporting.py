"""Reports as their readers get them: what is shown, and that hostile text stays text."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import reports
import rich_report
from qexport.artifact.report import ProfileRecord, Report
from qexport.errors import RecipeError
from qexport.reporting.html import report_html
from qexport.reporting.markdown import escaped, report_markdown
from qexport.reporting.svg import gauge
from qexport.reporting.terminal import figures_table, gate_table, report_summary
from qexport.reporting.values import (
    figure_interval,
    figure_value,
    format_value,
    gate_limit,
    gate_value,
    visible,
    visible_token,
    word_diff,
)
from qexport.reporting.view import summarize
from qexport.reporting.writing import check_report_folder, report_junit, write_report

VOID = {"meta", "wbr", "br"}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


class Page(HTMLParser):
    """Tags balance; what is loaded or run is noted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def rich() -> Report:
    return rich_report.rich_report()


@pytest.fixture(scope="module")
def page(rich: Report) -> str:
    return report_html(rich)


def printed(*parts: object) -> str:
    stream = StringIO()
    Console(file=stream, width=160).print(*parts)
    return stream.getvalue()


def minimal() -> Report:
    """What a measurement without prompts, speed, gates and layers leaves."""
    timings = reports.timings().model_copy(update={"speed": None, "speed_unmeasured": "not asked for", "figures": []})
    return reports.report(
        [], figures=[reports.figure("mean_kl", 0.0, half=0.0)], generations=None, layers=[], block_drift=[],
        flips_by_margin=[], worst_tokens=[], checks=[], readers=[], unconfirmed=[], timings=timings,
    )  # fmt: skip


# --- the page ---


def test_the_page_loads_and_runs_nothing(page: str) -> None:
    found = Page(page)
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"})
    names = {name for name, _ in found.attributes}
    assert names.isdisjoint({"src", "srcset", "style", "action", "background", "xlink:href"})
    assert [name for name in names if name.startswith("on")] == []
    assert all(value and value.startswith("#") for name, value in found.attributes if name == "href")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


def test_the_page_says_what_was_found(rich: Report, page: str) -> None:
    assert "1 of 9 gates failed: mean_kl[code]; 1 of 9 gates undecided: top1_agreement." in page
    for gate in rich.gates:
        assert gate.reason in page
    for digest in rich.identity.model_dump().values():
        assert digest in page
    assert rich.digest() in page
    assert rich.command in page
    for label in ("0.231 nats", "[0.212, 0.250]", "≤ 0.2 nats", "5 windows", "119 MB", "7.08 bits per weight"):
        assert label in page
    assert "Fell back to round-to-nearest: " in page
    assert page.index("mean_kl[code]</bdi>") < page.index("top1_agreement</bdi>") < page.index(">config</bdi>")


def test_every_chart_has_a_name_and_says_its_content(page: str) -> None:
    charts = re.findall(r"<svg [^>]*>", page)
    named = [chart for chart in charts if 'role="img"' in chart]
    assert len(named) == 6
    assert all('aria-hidden="true"' in chart for chart in charts if chart not in named)
    for chart in named:
        for identity in re.search(r'aria-labelledby="([^"]+)"', chart)[1].split():  # type: ignore[index]
            assert page.count(f'id="{identity}"') == 1


def test_anchors_lead_somewhere(page: str) -> None:
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'<section id="{anchor}">' in page


def test_hostile_text_stays_text(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;caught&#39;)&lt;/script&gt;" in page
    assert "\u202e" not in page
    assert "⟨U+202E⟩right to left" in page
    assert "\x1b" not in page


def test_the_same_report_gives_the_same_page(page: str) -> None:
    assert report_html(rich_report.rich_report()) == page


@pytest.mark.parametrize("report", [minimal(), reports.report()], ids=["minimal", "small"])
def test_what_was_not_measured_leaves_no_hole(report: Report) -> None:
    for text in (report_html(report), report_markdown(report), report_junit(report), printed(report_summary(report))):
        assert "None" not in text.replace(">None<", "")
        assert "nan" not in text
    Page(report_html(report))


def test_no_gate_is_not_told_as_passed() -> None:
    assert "No gate was set" in report_html(minimal())
    assert "No gate was set" in report_markdown(minimal())


@settings(max_examples=20)
@given(TEXTS)
def test_any_text_can_stand_in_a_report(text: str) -> None:
    report = reports.report(
        [reports.gate_result(f"mean_kl[{text}]", domain=text, reason=text)],
        figures=[reports.figure("mean_kl", 0.1), reports.figure("mean_kl", 0.2, domain=text)],
        worst_tokens=[reports.report().worst_tokens[0].model_copy(update={"before": text, "token": text})],
        notes=[text],
    )
    Page(report_html(report))
    ElementTree.fromstring(report_junit(report))
    report_markdown(report)


# --- values ---


@pytest.mark.parametrize(
    ("name", "value", "low", "high", "expected", "shown"),
    [
        ("mean_kl", 0.0712, 0.0652, 0.0779, "0.071 nats", "[0.065, 0.078]"),
        ("mean_kl", 0.0712, 0.0702, 0.0722, "0.0712 nats", "[0.0702, 0.0722]"),
        ("mean_kl", 0.0, 0.0, 0.0, "0 nats", "[0, 0]"),
        ("mean_kl", 0.0000032, None, None, "3.2 × 10⁻⁶ nats", "–"),
        ("top1_agreement", 0.99974, None, None, "99.974%", "–"),
        ("top1_agreement", 0.876, 0.86, 0.89, "87.6%", "[86.0, 89.0]"),
        ("decisive_flips", 0.0006, None, None, "0.060%", "–"),
        ("probability_change", -0.012, -0.02, -0.004, "−1.2 pp", "[−2.0, −0.4]"),
        ("probability_change_rms", 0.05, None, None, "5.00 pp", "–"),
        ("perplexity_ratio", 1.00043, None, None, "1.00043", "–"),
        ("artifact_perplexity", 36.98, 35.8, 38.2, "36.98", "[35.80, 38.20]"),
        ("artifact_perplexity", 12345.6, None, None, "12,345.60", "–"),
        ("kl_over_rtn", -0.352, -0.38, -0.32, "−0.35", "[−0.38, −0.32]"),
    ],
)
def test_values_have_the_digits_that_their_interval_supports(
    name: str, value: float, low: float | None, high: float | None, expected: str, shown: str
) -> None:
    figure = reports.figure(name, value, low=low, high=high, sequence_low=None, sequence_high=None)
    assert figure_value(figure) == expected
    assert figure_interval(figure) == shown


def test_a_figure_has_the_interval_that_its_gate_has() -> None:
    figure = reports.figure("mean_kl", 0.2, half=0.01)
    assert figure_interval(figure) == "[0.180, 0.220]"


@pytest.mark.parametrize(("equal", "few"), [(0, True), (6, True), (7, False)])
def test_few_equal_texts_are_explained(equal: int, few: bool) -> None:
    generations = reports.report().generations
    assert generations is not None
    report = reports.report(generations=generations.model_copy(update={"identical": equal, "prompts": 12}))
    sentence = "decisive flips count the choices that were clear"
    for shown in (report_html(report), " ".join(printed(report_summary(report)).split())):
        assert (sentence in shown) == few
    assert f"{equal} of 12 greedy continuations are equal" in report_html(report)


def test_profile_and_nearest_limit_stand_beside_the_verdict() -> None:
    gates = [reports.gate_result("mean_kl", room=0.4), reports.gate_result("top1_agreement", room=0.07)]
    profile = ProfileRecord(name="nf4-3b", strict=True, chosen="by name", reason="measured")
    report = reports.report(gates, profile=profile)
    said = "Limits of the profile nf4-3b, strict. Nearest to its limit: top1_agreement, 7% of what it allows is left."
    assert said in report_html(report).partition("<nav")[0]
    assert said in " ".join(printed(report_summary(report)).split())
    over = reports.report([reports.gate_result(verdict="fail", room=-0.2)])
    assert "Nearest to its limit: mean_kl, over it by 20% of what it allows." in report_html(over)


def test_date_and_command_come_first() -> None:
    timings = reports.report().timings.model_copy(update={"finished": datetime(2026, 3, 1, 23, 5, tzinfo=UTC)})
    head = report_html(reports.report(timings=timings)).partition("<nav")[0]
    assert "2026-03-01 23:05 UTC" in head
    assert reports.report().command in head


def test_unmeasured_gates_show_dashes_and_limits_stay_as_written() -> None:
    gate = reports.gate_result(value=None, low=None, high=None, limit=0.35, verdict="undecided")
    assert gate_value(gate) == "–"
    assert gate_limit(gate) == "≤ 0.35 nats"
    limit = reports.gate_result(figure="top1_agreement", bound="at_least", limit=0.07)
    assert gate_limit(limit) == "≥ 7%"
    assert format_value("a figure of the future", 2.5) == "2.50"


def marked(gate_name: str, **changes: object) -> tuple[float, float]:
    """Where the value and the limit are drawn."""
    drawn = gauge(reports.gate_result(gate_name, **changes))
    centre = re.search(r'cx="([\d.]+)"', drawn)
    limit = re.search(r'x1="([\d.]+)" y1="1"', drawn)
    assert centre
    assert limit
    return float(centre[1]), float(limit[1])


@pytest.mark.parametrize(
    ("figure", "bound", "limit", "value", "allowed"),
    [
        ("mean_kl", "at_most", 0.3, 0.1, True),
        ("mean_kl", "at_most", 0.3, 0.4, False),
        ("top1_agreement", "at_least", 0.8, 0.9, True),
        ("top1_agreement", "at_least", 0.8, 0.7, False),
        ("kl_over_rtn", "at_most", 0.0, -0.3, True),
        ("kl_over_rtn", "at_most", 0.0, 0.3, False),
        ("perplexity_ratio", "at_least", 0.9, 0.95, True),
    ],
)
def test_the_allowed_side_of_every_gauge_is_the_left(
    figure: str, bound: str, limit: float, value: float, allowed: bool
) -> None:
    at, line = marked(figure, figure=figure, bound=bound, limit=limit, value=value, low=value, high=value)
    assert (at < line) == allowed


# --- text ---


@given(TEXTS, TEXTS)
def test_a_diff_loses_nothing(reference: str, artifact: str) -> None:
    left, right = word_diff(reference, artifact)
    assert "".join(piece.text for piece in left) == reference
    assert "".join(piece.text for piece in right) == artifact
    assert [piece.text for piece in left if piece.shared] == [piece.text for piece in right if piece.shared]


def test_a_diff_compares_words() -> None:
    left, right = word_diff("the council met today", "the council sat today")
    assert [(piece.text, piece.shared) for piece in left] == [
        ("the council ", True), ("met", False), (" today", True),
    ]  # fmt: skip
    assert [piece.text for piece in right if not piece.shared] == ["sat"]


@given(TEXTS)
def test_visible_text_steers_nothing(text: str) -> None:
    shown = visible(text)
    assert not set(shown) & {chr(code) for code in range(0x20) if code not in (9, 10)}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x7f\x9b")


def test_tokens_show_their_blanks() -> None:
    assert visible_token(" the\n") == "·the⏎"
    assert visible_token("") == "∅"
    assert visible_token("\x1b") == "␛"


# --- JUnit ---


def test_junit_counts_what_its_cases_say(rich: Report) -> None:
    root = ElementTree.fromstring(report_junit(rich))
    assert root.tag == "testsuites"
    (suite,) = root
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [gate.name for gate in rich.gates]
    outcomes = {case.get("name"): [child.tag for child in case] for case in cases}
    assert outcomes["mean_kl[code]"] == ["failure"]
    assert outcomes["top1_agreement"] == ["error"]
    assert outcomes["mean_kl"] == ["system-out"]
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("9", "1", "1")
    error = suite.find("testcase/error")
    assert error is not None
    assert error.get("type") == "undecided"


def test_junit_follows_the_common_schema(rich: Report) -> None:
    """The order of a suite's children, the attributes that servers ask for, and no other elements."""
    suite = ElementTree.fromstring(report_junit(rich))[0]
    order = ["properties", "testcase", "system-out", "system-err"]
    tags = [child.tag for child in suite]
    assert tags == sorted(tags, key=order.index)
    assert {"name", "tests", "failures", "errors", "time"} <= set(suite.keys())
    for case in suite.findall("testcase"):
        assert {"name", "classname", "time"} == set(case.keys())
        assert {child.tag for child in case} <= {"skipped", "error", "failure", "system-out", "system-err"}
    properties = {each.get("name"): each.get("value") for each in suite.iterfind("properties/property")}
    assert properties["mean_kl"] == "0.161"
    assert float(properties["mean_kl[code]"] or "") == 0.231
    assert properties["verdict"] == "fail"


def test_junit_leaves_out_what_xml_cannot_write() -> None:
    gate = reports.gate_result(verdict="fail", reason="\x00 \ufffe \x1b[31m ]]> <b>")
    text = report_junit(reports.report([gate]))
    failure = ElementTree.fromstring(text).find("testsuite/testcase/failure")
    assert failure is not None
    assert "]]> <b>" in (failure.get("message") or "")
    assert "\x1b" not in text


# --- Markdown ---


def test_markdown_has_a_row_for_each_gate_and_folds_the_worst_prompt(rich: Report) -> None:
    text = report_markdown(rich)
    assert text.startswith("### ❌ Failed: model + adapter\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    # gates, release, figures, weights, answers of a suite, lengths
    assert len(rows) == 2 + len(rich.gates) + 2 + 4 + 2 + 10 + 2 + 1 + 2 + 1 + 2 + 3
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[: 2 + len(rich.gates)]}
    assert widths == {8}
    assert text.count("<details>") == text.count("</details>") == 1
    assert "\n\nprompt:\n<pre>" in text
    assert "<script" not in text


@pytest.mark.parametrize(
    "text",
    ["a | b", "`code`", "<b>bold</b>", "[text](http://x.example)", "@team", "#12", "![x](y)", "a\n\n# b", "*a* ~~b~~",
     "https://x.example", "$x$"],
)  # fmt: skip
def test_markdown_formats_calls_and_links_nothing(text: str) -> None:
    shown = escaped(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[|`*_\[\]~:$]", shown)
    assert not re.search(r"<|>", shown)
    assert not re.search(r"[@#!](?!\0)", shown.replace("&#8203;", "\0"))


# --- the terminal ---


def test_tables_are_plain_text_where_there_is_no_terminal(rich: Report) -> None:
    shown = summarize(rich)
    text = printed(gate_table(shown.gates), figures_table(shown.figures))
    assert "\x1b" not in text
    rows = [line.split()[:2] for line in text.splitlines()[2:5]]
    assert rows == [["mean_kl[code]", "failed"], ["top1_agreement", "undecided"], ["config", "passed"]]
    assert re.search(r"mean KL divergence +0\.161 nats +\[0\.153, 0\.169\] +38 windows", text)


def test_nothing_is_lost_on_eighty_columns(rich: Report) -> None:
    stream = StringIO()
    Console(file=stream, width=80).print(report_summary(rich))
    words = " ".join(stream.getvalue().split())
    assert "…" not in words.replace("<…", "")
    for shown in ("top1_agreement undecided 79.3%", "mean_kl[code]: over 0.2 nats with its whole interval", "1.147"):
        assert shown in words


def test_text_cannot_steer_the_terminal() -> None:
    hostile = reports.comparison(prompt="\x1b[2Jgone", artifact="\x1b]0;title\x07 [bold]loud[/bold]")
    generations = reports.report().generations
    assert generations is not None
    report = reports.report(generations=generations.model_copy(update={"comparisons": [hostile]}))
    text = printed(report_summary(report))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]loud[/bold]" in " ".join(text.split())


# --- files ---


def test_all_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "artifact" / "report"
    report = reports.report()
    write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]
    assert Report.read(folder.parent) == report
    undecided = reports.report([reports.gate_result(verdict="undecided")])
    write_report(undecided, folder)
    assert Report.read(folder) == undecided
    assert "Undecided" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(reports.report(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(reports.report([reports.gate_result(verdict="fail")]), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", range(4))
def test_all_files_are_new_or_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException
) -> None:
    """The nth file finds the disk full, or Ctrl-C comes while it is written."""
    write_report(reports.report(), tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    write, written = Path.write_bytes, []

    def limited(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) > nth:
            write(path, content[:10])
            raise error
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", limited)
    for folder in (tmp_path / "old", tmp_path / "new" / "report"):
        written.clear()
        with pytest.raises(type(error)):
            write_report(reports.report([reports.gate_result(verdict="fail")]), folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_folder_in_place_of_the_last_file_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(reports.report(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]


@pytest.mark.parametrize("fault", ["file", "file above", "link to nothing", "folder"])
def test_what_is_in_the_way_of_a_report_is_told_before_it_is_measured(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "report"
    match fault:
        case "file" | "file above":
            folder.write_text("mine")
        case "link to nothing":
            folder.symlink_to("nowhere")
        case "folder":
            (folder / "report.md").mkdir(parents=True)
    with pytest.raises(RecipeError, match="in the way"):
        check_report_folder(folder / "deep" if fault == "file above" else folder)


def test_a_comment_and_a_table_stay_short_however_long_the_continuations_are() -> None:
    """GitHub takes comments of at most 65,536 characters."""
    endless = reports.comparison(prompt="a " * 50_000, reference="b " * 50_000, artifact="c " * 50_000)
    generations = reports.report().generations
    assert generations is not None
    found = reports.report(generations=generations.model_copy(update={"comparisons": [endless]}))
    assert len(report_markdown(found)) < 20_000
    assert len(printed(report_summary(found))) < 40_000


@pytest.mark.parametrize("value", [1e308, 5e-324])
def test_a_model_that_is_beyond_all_measure_has_a_page_too(value: float) -> None:
    broken = reports.figure("mean_kl", value, low=value, high=value, sequence_low=value, sequence_high=value)
    layers = [reports.layer(loss=value, rtn_loss=1e-320)]
    assert "<svg" in report_html(reports.report(figures=[broken], layers=layers))
