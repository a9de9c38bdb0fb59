"""stdout carries results, stderr everything else. A reader that goes away early stops neither."""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

from rich.console import Console


class Terminal(Console):
    """A rich console that keeps silent once nobody reads it; the run goes on and its exit code stays."""

    def on_broken_pipe(self) -> None:
        """Called by rich in place of an error."""
        self.quiet = True
        _discard(sys.stderr if self.stderr else sys.stdout)


def stdout() -> Terminal:
    """The console for results."""
    return Terminal(highlight=False)


def stderr() -> Terminal:
    """The console for progress, notes and errors."""
    return Terminal(stderr=True, highlight=False)


def write(text: str) -> None:
    """Writes a result to stdout as it is, with a newline at its end.

    Raises:
        OSError: it could not be written, for example because the disk is full.
    """
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def write_json(document: Any) -> None:
    """Writes the one JSON document of a command with `--json`."""
    write(json.dumps(document, indent=2, ensure_ascii=False))


def _discard(stream: IO[str]) -> None:
    """Lets a stream end in the null device, so that what libraries write to it later fails no run."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
