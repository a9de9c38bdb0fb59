"""Writes the files of a verified artifact's `report/`, and makes the test results among them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from qexport.artifact.disk import make_folder, write_together
from qexport.artifact.figures import Figure
from qexport.artifact.integrity import refuse_inside_artifact
from qexport.artifact.report import REPORT_NAME, Report
from qexport.errors import RecipeError
from qexport.reporting.html import report_html
from qexport.reporting.markdown import report_markdown
from qexport.reporting.selection import sentence
from qexport.reporting.values import visible
from qexport.reporting.view import GateRow, gate_row

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def report_junit(report: Report) -> str:
    """A JUnit suite with one case per gate. A failed gate is a `failure`; an undecided one is an `error` of type
    `undecided`, since a skipped test would look harmless. Figures are the suite's properties. The same report gives the
    same text, without a timestamp.
    """
    verdicts = [gate.verdict for gate in report.gates]
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("undecided")),
        "time": f"{report.timings.seconds:.3f}",
    }
    root = Element("testsuites", {"name": "qexport", **counts})
    name = _clean(f"qexport: {report.subject.name}")
    suite = SubElement(root, "testsuite", {"name": name, **counts, "skipped": "0"})
    _add_properties(suite, report)
    for gate in report.gates:
        _add_case(suite, gate_row(gate), _clean(report.subject.name))
    SubElement(suite, "system-out").text = _clean(f"{sentence(report)}\n{report.command}")
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _add_properties(suite: Element, report: Report) -> None:
    properties = SubElement(suite, "properties")
    facts = {
        "verdict": report.verdict,
        "method": report.subject.method,
        "total_bytes": str(report.subject.sizes.total_bytes),
        "bits_per_weight": f"{report.subject.sizes.bits_per_weight:g}",
        "report_sha256": report.digest(),
    }
    for name, value in facts.items():
        SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for figure in report.all_figures:
        SubElement(properties, "property", {"name": _clean(_name(figure)), "value": repr(figure.value)})


def _name(figure: Figure) -> str:
    return figure.name if figure.domain is None else f"{figure.name}[{figure.domain}]"


def _add_case(suite: Element, row: GateRow, subject: str) -> None:
    gate = row.result
    case = SubElement(suite, "testcase", {"name": _clean(gate.name), "classname": subject, "time": "0"})
    detail = f"value {row.value}, interval {row.interval}, tolerance {row.tolerance}, n {row.units}"
    if gate.verdict == "pass":
        SubElement(case, "system-out").text = _clean(f"{gate.reason}\n{detail}")
        return
    element, kind = ("failure", "fail") if gate.verdict == "fail" else ("error", "undecided")
    SubElement(case, element, {"message": _clean(gate.reason), "type": kind}).text = _clean(detail)


def _clean(text: str) -> str:
    """Removes the characters that XML cannot represent."""
    return _NOT_XML.sub("", visible(text))


PAGE_NAME: Final = "report.html"
COMMENT_NAME: Final = "report.md"
TEST_RESULTS_NAME: Final = "junit.xml"
FILE_NAMES: Final = (REPORT_NAME, PAGE_NAME, COMMENT_NAME, TEST_RESULTS_NAME)
_MEND: Final = "name another folder with --report"


def report_files(report: Report) -> dict[str, str]:
    """The report in every format, by file name. The same report gives the same texts."""
    return {
        REPORT_NAME: report.to_json(),
        PAGE_NAME: report_html(report),
        COMMENT_NAME: report_markdown(report),
        TEST_RESULTS_NAME: report_junit(report),
    }


def write_report(report: Report, folder: Path) -> None:
    """Writes the report in every format, all files or none. Existing files are replaced.

    Args:
        report: the report of a verification.
        folder: created with its parents if it is missing.

    Raises:
        OSError: a file could not be written; files and folders are as they were.
    """
    contents = report_files(report)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        make_folder(folder)
        write_together(folder, contents)
    except BaseException:
        with suppress(OSError):  # not created, or another program has put a file into it
            for each in missing:
                each.rmdir()
        raise


def check_report_folder(folder: Path) -> None:
    """Checks that a report can be written to a folder, before anything is measured.

    Raises:
        RecipeError: a file is in the way of the folder, a folder in the way of a file, it cannot be written, or it is
            inside an artifact, whose listing would no longer be true.
    """
    refuse_inside_artifact(folder, "the report's folder")
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise RecipeError("a file is in the way of the report's folder", where=str(existing), mend=_MEND)
    for name in FILE_NAMES:
        if (folder / name).is_dir():
            raise RecipeError("a folder is in the way of a report's file", where=str(folder / name), mend=_MEND)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError("the report's folder cannot be written", where=str(existing), mend=_MEND)
