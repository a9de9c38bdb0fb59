"""The last line of `make test-faults`: how many points there were."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    total = sum(value for report in reports for name, value in report.user_properties if name == "points")
    terminalreporter.write_line(f"{total} points")
