"""The gates as test results in JUnit's XML, which servers for continuous integration show."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from qexport.artifact.figures import Figure, GateResult
from qexport.artifact.report import Report
from qexport.reporting.selection import sentence
from qexport.reporting.values import gate_interval, gate_limit, gate_units, gate_value
from qexport.reporting.visible_text import visible

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def report_junit(report: Report) -> str:
    """A suite with one case a gate. A failed gate is a `failure`; an undecided one is an `error` of type `undecided`,
    since a skipped test would look like no harm. Figures are the suite's properties. The same report gives the same
    text; no time of day is in it.
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
        _add_case(suite, gate, _clean(report.subject.name))
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


def _add_case(suite: Element, gate: GateResult, subject: str) -> None:
    case = SubElement(suite, "testcase", {"name": _clean(gate.name), "classname": subject, "time": "0"})
    detail = (
        f"value {gate_value(gate)}, interval {gate_interval(gate)}, tolerance {gate_limit(gate)}, n {gate_units(gate)}"
    )
    if gate.verdict == "pass":
        SubElement(case, "system-out").text = _clean(f"{gate.reason}\n{detail}")
        return
    element, kind = ("failure", "fail") if gate.verdict == "fail" else ("error", "undecided")
    SubElement(case, element, {"message": _clean(gate.reason), "type": kind}).text = _clean(detail)


def _clean(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return _NOT_XML.sub("", visible(text))
