"""The command-line program: its entry point, the options that several commands share, and progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.cli.failures import Failure, raise_if_interrupted
from qexport.cli.terminal import stderr, write
from qexport.errors import RecipeError
from qexport.hidden_packages import hidden

if TYPE_CHECKING:
    from qexport.progress import Notice, Progress, ProgressCallback

app = typer.Typer(
    help="From a base model and a LoRA adapter to a verified, quantized, servable artifact, in one streaming pass.",
    epilog="Exit codes: 0 success, 1 a defect in qexport, 2 usage or recipe, 3 model, adapter or data, 4 these "
    "do not fit together, 5 numerical error, 6 a gate failed, 7 a gate is undecided, 8 no disk or memory left, "
    "130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Replaces a value of the recipe, for example quantize.bits=8."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the arguments after the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # torch's idle threads spin: that costs an eighth of a run's CPU time, and far more when other programs run too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with hidden("kernels"):
            return app(arguments, prog_name="qexport", standalone_mode=False) or 0
    except typer.TyperException as error:
        failure = Failure(error.format_message(), RecipeError.exit_code, mend=_help_for(arguments))
        failure.show(as_json="--json" in arguments)
        return failure.exit_code


def _help_for(arguments: Sequence[str]) -> str:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    command = next((word for word in arguments if word in names), None)
    return f"qexport {command} --help" if command else "qexport --help"


@app.callback(invoke_without_command=True)
def _qexport(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        write(f"qexport {version('qexport')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.get_help()


@contextmanager
def showing_progress() -> Iterator[ProgressCallback]:
    """Shows progress on stderr. Output of libraries is redirected there too, since stdout is for results."""
    from qexport.cli.terminal import progress_display

    with progress_display(stderr()) as display, redirect_stdout(sys.stderr):

        def show(event: Progress | Notice) -> None:
            raise_if_interrupted()
            display(event)

        yield show
