"""The files that a verified artifact carries in `report/`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.artifact.disk import write_whole
from qexport.artifact.report import REPORT_NAME, Report
from qexport.reporting.html import report_html
from qexport.reporting.junit import report_junit
from qexport.reporting.markdown import report_markdown

PAGE_NAME: Final = "report.html"
COMMENT_NAME: Final = "report.md"
TEST_RESULTS_NAME: Final = "junit.xml"


def write_report(report: Report, folder: Path) -> None:
    """Writes the report in every form, each file whole or not at all; files of these names are replaced.

    Args:
        report: what verification found.
        folder: created with its parents where it is missing.

    Raises:
        OSError: a file could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        REPORT_NAME: report.to_json(),
        PAGE_NAME: report_html(report),
        COMMENT_NAME: report_markdown(report),
        TEST_RESULTS_NAME: report_junit(report),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
