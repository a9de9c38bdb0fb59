"""What `qexport report` shows: one report, or several compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType

from qexport.artifact.disk import write_whole
from qexport.artifact.report import Report
from qexport.errors import RecipeError
from qexport.reporting.comparison import ArtifactComparison, compare
from qexport.reporting.comparison_views import comparison_html, comparison_markdown, comparison_table
from qexport.reporting.html import report_html
from qexport.reporting.markdown import report_markdown
from qexport.reporting.terminal import report_summary


class Views(Protocol):
    """The same content in every form."""

    def page(self) -> str:
        """HTML."""
        ...

    def document(self) -> dict[str, Any]:
        """For JSON."""
        ...

    def markdown(self) -> str:
        """For a pull request."""
        ...

    def table(self) -> RenderableType:
        """For the terminal."""
        ...


class _One:
    def __init__(self, report: Report) -> None:
        self._report = report

    def page(self) -> str:
        return report_html(self._report)

    def document(self) -> dict[str, Any]:
        return self._report.model_dump(mode="json")

    def markdown(self) -> str:
        return report_markdown(self._report)

    def table(self) -> RenderableType:
        return report_summary(self._report)


class _Several:
    def __init__(self, comparison: ArtifactComparison) -> None:
        self._comparison = comparison

    def page(self) -> str:
        return comparison_html(self._comparison)

    def document(self) -> dict[str, Any]:
        return self._comparison.as_dict()

    def markdown(self) -> str:
        return comparison_markdown(self._comparison)

    def table(self) -> RenderableType:
        return comparison_table(self._comparison)


def views_of(paths: Sequence[Path]) -> Views:
    """Of the report, where there is one path; else of all of them side by side.

    Raises:
        InputError: a report cannot be read, or they cannot be compared.
    """
    reports = [Report.read(path) for path in paths]
    return _One(reports[0]) if len(reports) == 1 else _Several(compare(reports))


def check_page(path: Path, *, force: bool) -> None:
    """Checks that a page may be written.

    Raises:
        RecipeError: a folder is in the way, or a file and `force` is not given, or its folder is missing.
    """
    if path.is_dir():
        raise RecipeError("a folder is in the way of the page", where=str(path), mend="give the path of a file")
    if path.exists() and not force:
        raise RecipeError(
            "the page exists already", where=str(path), mend="choose another file, or replace it with --force"
        )
    if not path.parent.is_dir():
        raise RecipeError("the page's folder is missing", where=str(path.parent), mend="create it")


def write_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all; a link is followed.

    Raises:
        RecipeError: the folder cannot be written.
    """
    try:
        write_whole(path.resolve(), page)
    except PermissionError as error:
        raise RecipeError(f"the page cannot be written: {error.strerror}", where=str(path)) from error
