"""The command-line program: its entry point, exceptions as three lines and an exit code, shared options, progress."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich.text import Text

from qexport.artifact.disk import disk_failure
from qexport.cli.terminal import stderr, write, write_json
from qexport.deferred_imports import defer_scipy_optimize
from qexport.errors import GO_ON, QexportError, RecipeError, ResourceError
from qexport.hidden_packages import hidden
from qexport.reporting.values import visible

if TYPE_CHECKING:
    from qexport.progress import Notice, Progress, ProgressCallback

INTERRUPTED = 130
_PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True)
class Failure:
    """An error as the user sees it, and its exit code."""

    what: str
    exit_code: int
    where: str | None = None
    mend: str | None = None

    def show(self, *, as_json: bool) -> None:
        """Prints the lines to stderr; as JSON, one document to stdout as well."""
        lines = (("error", self.what, "bold red"), ("where", self.where, "bold"), ("mend", self.mend, "bold"))
        for label, text, style in lines:
            if text:
                stderr().print(Text.assemble((f"{label}: ".ljust(7), style), visible(text)), soft_wrap=True)
        if as_json:
            with suppress(OSError):  # stdout cannot be written; stderr has the error already
                write_json({"error": asdict(self)})


@contextmanager
def reporting_errors(*, as_json: bool = False, debug: bool = False, interrupted: str = "interrupted") -> Iterator[None]:
    """Prints any exception of the block and exits with its code.

    Args:
        as_json: print a JSON document on stdout too.
        debug: print the traceback first.
        interrupted: the message after Ctrl-C or SIGTERM.

    Raises:
        typer.Exit: in place of any other exception.
    """
    try:
        with _sigterm_as_interrupt():
            yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        failure = Failure(interrupted, INTERRUPTED) if isinstance(error, KeyboardInterrupt) else failure_of(error)
        if GO_ON in getattr(error, "__notes__", ()):
            failure = replace(failure, mend="; ".join(filter(None, (failure.mend, GO_ON))))
        failure.show(as_json=as_json)
        raise typer.Exit(failure.exit_code) from error


def failure_of(error: Exception) -> Failure:
    """Maps an exception to its message and exit code."""
    place = error.where if isinstance(error, QexportError) else getattr(error, "filename", None)
    if failure := disk_failure(error, where=place):
        return failure_of(failure)
    if isinstance(error, QexportError) and type(error) is not QexportError:
        return Failure(error.what, error.exit_code, error.where, error.mend)
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename is not None:
        mend = "check the path and its permissions"
        return Failure(f"a path cannot be used: {error.strerror}", RecipeError.exit_code, str(error.filename), mend)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        mend = "close other programs, use fewer or shorter calibration samples, or a machine with more memory"
        return Failure("there is not enough memory", ResourceError.exit_code, mend=mend)
    what, where = (error.what, error.where) if isinstance(error, QexportError) else (_named(error), None)
    mend = "run it again with --debug and report the traceback"
    return Failure(f"a defect in qexport: {what}", QexportError.exit_code, where, mend)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_torch_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


_received_signals: list[int] = []
"""SIGINT and SIGTERM received since the command began."""


def raise_if_interrupted() -> None:
    """Raises the interrupt again if a library swallowed it, during an import or in a callback.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM was received.
    """
    if _received_signals:
        raise KeyboardInterrupt


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that both clean up in the same way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received_signals.clear()
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> None:
    _received_signals.append(number)
    raise KeyboardInterrupt


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
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of a Ray cluster that share the work, see `execution`.")
]
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
    defer_scipy_optimize()
    try:
        with hidden("kernels"):
            return app(arguments, prog_name="qexport", standalone_mode=False) or 0
    except typer.TyperException as error:
        failure = Failure(error.format_message(), RecipeError.exit_code, mend=_help_for(arguments))
        failure.show(as_json="--json" in arguments)
        return failure.exit_code


_MOMENTS: Final = (
    "inspect",
    "plan",
    "run",
    "sweep",
    "check",
    "validate",
    "verify",
    "gate",
    "report",
    "diff",
    "rebuild",
    "release",
    "promote",
)


def listed_by_moment() -> None:
    """Lists the commands in the order in which one needs them."""
    order = {name: place for place, name in enumerate(_MOMENTS)}
    app.registered_commands.sort(key=lambda command: order.get(_name_of(command), len(order)))


def _name_of(command: typer.models.CommandInfo) -> str:
    return command.name or (command.callback.__name__ if command.callback else "")


def _help_for(arguments: Sequence[str]) -> str:
    names = [_name_of(command) for command in app.registered_commands]
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
