"""Turns exceptions into three lines on stderr and an exit code; `qexport.errors` lists the codes."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType

import typer
from rich.text import Text

from qexport.artifact.disk import is_disk_full
from qexport.cli.terminal import stderr, write_json
from qexport.errors import QexportError, RecipeError, ResourceError
from qexport.reporting.visible_text import visible

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
        failure.show(as_json=as_json)
        raise typer.Exit(failure.exit_code) from error


def failure_of(error: Exception) -> Failure:
    """Maps an exception to its message and exit code."""
    if isinstance(error, QexportError) and type(error) is not QexportError:
        return Failure(error.what, error.exit_code, error.where, error.mend)
    if isinstance(error, OSError) and is_disk_full(error):
        mend = "free some space, or choose an output on another disk"
        return Failure("the disk is full", ResourceError.exit_code, error.filename, mend)
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
