"""The last lines of `make test-faults`: how many points there were, as the table in docs/reliability.md."""

from __future__ import annotations

from collections import Counter

import pytest

from faults.points import KINDS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    found = [value for report in reports for name, value in report.user_properties if name == "points"]
    points, layouts = Counter[tuple[str, str]](), dict[str, set[str]]()
    for run, layout, kind, number in found:
        points[run, kind] += number
        layouts.setdefault(run, set()).add(layout)
    for run in sorted(layouts):
        cells = [run, str(len(layouts[run])), *(str(points[run, kind]) for kind in KINDS)]
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
    terminalreporter.write_line(f"{points.total()} points")
