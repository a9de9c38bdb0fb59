"""A command of qexport in a fork of this process, with limits of time and memory, and what came of it."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fresh import exit_code
from qexport.cli import main

SECONDS = 10
MEMORY = 1 << 30
"""More than the process has already, in bytes."""


@dataclass(frozen=True)
class Outcome:
    """An exit code (negative: the signal that ended it), both outputs, and processor time in seconds."""

    code: int
    out: str
    err: str
    seconds: float


def forked(arguments: Sequence[str], folder: Path) -> Outcome:
    """Runs the command line in `folder`."""
    return fork(lambda: main([*arguments]), folder)


def fork(call: Callable[[], int], folder: Path) -> Outcome:
    """Calls a function that returns an exit code; any exception is code 1 with a traceback."""
    outputs = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os._exit(exit_code(lambda: _limited(call, folder, outputs)))
    _, status, used = os.wait4(child, 0)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    return Outcome(os.waitstatus_to_exitcode(status), out, err, used.ru_utime + used.ru_stime)


def _limited(call: Callable[[], int], folder: Path, outputs: Sequence[Path]) -> int:
    os.chdir(folder)
    files = [path.open("w", encoding="utf-8") for path in outputs]
    for file, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return call()


def faults(found: Outcome, expected: int, says: str, folder: Path, *, as_json: bool) -> list[str]:
    """What the contract of errors says and the outcome does not keep to."""
    code = found.code
    problems = [] if code == expected else [f"exit code {code}, not {expected}"]
    if "Traceback" in found.err or "a defect in qexport" in found.err:
        problems.append("a traceback, or an error that is called a defect")
    if code and sum(line.startswith("error:") for line in found.err.splitlines()) != 1:
        problems.append("not one error")
    if says not in found.err + found.out:
        problems.append(f"{says!r} is not said")
    refused = code not in (0, 6, 7)  # gates that fail are a result
    if as_json and refused and "error" not in json.loads(found.out or "{}"):
        problems.append("no JSON document with the error")
    if (folder / "out").exists() and code:
        problems.append("something is at the final path")
    if (folder / "fired").exists():
        problems.append("code of a stranger ran")
    return [f"{problem}\n{found.err[-1500:]}" for problem in problems]
