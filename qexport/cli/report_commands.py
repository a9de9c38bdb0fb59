"""The commands `gate`, `report` and `schema`. They read existing reports and measure nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import RenderableType
from rich.text import Text

from qexport.artifact.agreement import read_report
from qexport.artifact.disk import write_whole
from qexport.artifact.report import Report
from qexport.cli.app import AsJson, Debug, app, reporting_errors
from qexport.cli.terminal import stderr, stdout, write, write_json
from qexport.errors import RecipeError
from qexport.reporting.comparison import (
    ArtifactComparison,
    compare,
    comparison_html,
    comparison_markdown,
    comparison_table,
)
from qexport.reporting.html import report_html
from qexport.reporting.markdown import report_markdown
from qexport.reporting.terminal import report_summary
from qexport.reporting.values import visible

if TYPE_CHECKING:
    from qexport.artifact.figures import GateResult

Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Do not compare the report with the digests of its artifact.")
]


class Views(Protocol):
    """One report, or a comparison of several, in every output format."""

    def page(self) -> str:
        """As HTML."""
        ...

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        ...

    def markdown(self) -> str:
        """As Markdown, for a comment on a pull request."""
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


def views_of(paths: Sequence[Path], *, check: bool = True) -> Views:
    """The views of a report, or of a comparison if there are several paths.

    Args:
        paths: of reports or of artifacts.
        check: whether reports of artifacts are compared with digests and manifest.
    """
    reports = [_read(path, check=check) for path in paths]
    return _One(reports[0]) if len(reports) == 1 else _Several(compare(reports))


def _read(path: Path, *, check: bool) -> Report:
    """Reads a report; says so if it is not compared with the digests of its artifact."""
    if not check:
        note = f"the report of {visible(str(path))} was not compared with its digests"
        stderr().print(Text.assemble(("note: ", "yellow"), note), soft_wrap=True)
    return read_report(path, check=check)


def check_page(path: Path, *, force: bool) -> None:
    """Checks that a page may be written.

    Raises:
        RecipeError: the path is a folder, or a file without `force`, or its folder is missing.
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
    """Writes a page atomically. A symbolic link is followed.

    Raises:
        RecipeError: the folder cannot be written.
    """
    try:
        write_whole(path.resolve(), page)
    except PermissionError as error:
        raise RecipeError(f"the page cannot be written: {error.strerror}", where=str(path)) from error


@app.command()
def gate(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="A report.json, or the folder of a verified artifact.")
    ],
    gates: Annotated[Path, typer.Option(metavar="FILE", help="The limits: a YAML file with profile and gates.")],
    unchecked: Unchecked = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Decide on a report's figures with other limits, without measuring again."""
    with reporting_errors(as_json=as_json, debug=debug):
        from qexport.gates import read_gates
        from qexport.gates.deciding_again import decide_again
        from qexport.gates.failures import gates_error
        from qexport.gates.serving import decide_served_again
        from qexport.quantizing import profile_of_layer
        from qexport.reporting.terminal import gate_table
        from qexport.reporting.view import gate_rows

        settings = read_gates(gates)
        found = _read(report, check=not unchecked)
        results, notes = decide_again(found, settings, profile_of_layer)
        served, served_notes = decide_served_again(found, settings, profile_of_layer)
        results, notes = [*results, *served], [*notes, *served_notes]
        unmet = gates_error(results, str(report))
        if as_json:
            _write_gates(results, notes)
        else:
            for note in notes:
                stderr().print(Text.assemble(("note: ", "yellow"), note), soft_wrap=True)
            stdout().print(gate_table(gate_rows(results)))
    with reporting_errors(debug=debug):
        if unmet:
            raise unmet


def _write_gates(results: Sequence[GateResult], notes: Sequence[str]) -> None:
    from qexport.artifact.figures import overall

    verdict = overall(result.verdict for result in results)
    gates = [result.model_dump(mode="json") for result in results]
    write_json({"verdict": verdict, "gates": gates, "notes": list(notes)})


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="REPORT...", help="A report.json, or the folder of a verified artifact."),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a report, or compare several: size against drift."""
    with reporting_errors(as_json=as_json, debug=debug):
        if as_markdown and as_json:
            raise RecipeError("--markdown and --json exclude each other", mend="give only one of them")
        if html is not None:
            check_page(html, force=force)
        views = views_of(paths, check=not unchecked)
        if html is not None:
            write_page(html, views.page())
        if as_json:
            write_json(views.document())
        elif as_markdown:
            write(views.markdown())
        else:
            stdout().print(views.table())


@app.command()
def schema(
    of: Annotated[
        Literal["recipe", "report", "sweep"], typer.Argument(metavar="[recipe|report|sweep]", help="Which schema.")
    ] = "recipe",
) -> None:
    """Print the JSON Schema of recipes or sweeps, for editors, or of report.json."""
    with reporting_errors():
        match of:
            case "report":
                from qexport.artifact.report import report_schema

                write(json.dumps(report_schema(), indent=2))
            case "sweep":
                from qexport.recipe.sweep import sweep_schema

                write(sweep_schema())
            case "recipe":
                from qexport.recipe.reference import recipe_schema

                write(recipe_schema())
