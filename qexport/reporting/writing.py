"""The files that a verified artifact carries in `report/`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from qexport.artifact.disk import write_together
from qexport.artifact.report import REPORT_NAME, Report
from qexport.errors import RecipeError
from qexport.reporting.html import report_html
from qexport.reporting.junit import report_junit
from qexport.reporting.markdown import report_markdown

PAGE_NAME: Final = "report.html"
COMMENT_NAME: Final = "report.md"
TEST_RESULTS_NAME: Final = "junit.xml"
FILE_NAMES: Final = (REPORT_NAME, PAGE_NAME, COMMENT_NAME, TEST_RESULTS_NAME)
_MEND: Final = "name another folder with --report"


def write_report(report: Report, folder: Path) -> None:
    """Writes the report in every form, all files whole or none; files of these names are replaced.

    Args:
        report: what verification found.
        folder: created with its parents where it is missing.

    Raises:
        OSError: a file could not be written; files and folders are as they were.
    """
    contents = {
        REPORT_NAME: report.to_json(),
        PAGE_NAME: report_html(report),
        COMMENT_NAME: report_markdown(report),
        TEST_RESULTS_NAME: report_junit(report),
    }
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, contents)
    except BaseException:
        with suppress(OSError):  # not made, or somebody has put something into it
            for each in missing:
                each.rmdir()
        raise


def check_report_folder(folder: Path) -> None:
    """Checks that a report may be written to a folder, before it is measured.

    Raises:
        RecipeError: a file is in the way of the folder, a folder in the way of a file, or it cannot be written.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise RecipeError("a file is in the way of the report's folder", where=str(existing), mend=_MEND)
    for name in FILE_NAMES:
        if (folder / name).is_dir():
            raise RecipeError("a folder is in the way of a report's file", where=str(folder / name), mend=_MEND)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError("the report's folder cannot be written", where=str(existing), mend=_MEND)
