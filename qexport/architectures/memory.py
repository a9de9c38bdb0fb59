"""The memory of this process: how much is resident, how much it may take, and what malloc keeps after freeing."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes; `now` is None if the system does not report it."""

    now: int | None
    peak: int


def resident() -> Memory:
    """VmRSS and VmHWM of `/proc/self/status`; if the system has no VmHWM, the peak that `getrusage` reports."""
    fields = _status()
    peak = fields.get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    return Memory(fields.get("VmRSS"), peak)


def _status() -> dict[str, int]:
    """The fields of the status file that count kilobytes, in bytes; empty if the file cannot be read."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


@dataclass(frozen=True)
class Budget:
    """How much main memory this process may take, and what follows from it. Nothing in it changes a weight.

    Attributes:
        limit: bytes of the whole process. What does not fit is not loaded as a whole.
        expert_hessians: bytes for the Hessians of a mixture's experts that are summed at the same time.
        compared_tokens: tokens that go through a block at a time while models are compared.
    """

    limit: float = math.inf
    expert_hessians: float = math.inf
    compared_tokens: float = math.inf


_budgets = [Budget()]
"""The last one holds. It belongs to the process, like its memory; a context variable would not reach the greenlets in
which paused forwards run."""


def budget() -> Budget:
    """What holds now; without limits of its own outside `keeping_to`."""
    return _budgets[-1]


@contextmanager
def keeping_to(chosen: Budget) -> Iterator[None]:
    """Makes everything within the context keep to a budget."""
    _budgets.append(chosen)
    try:
        yield
    finally:
        _budgets.pop()


def return_freed_memory() -> None:
    """Returns free pages to the system if the C library can (glibc); else does nothing.

    Activations of many sizes are allocated and freed between tensors that stay, and malloc keeps the gaps: up to
    100 MB on a model whose blocks have 7 MB.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class _FreedMemory:
    """How much was resident at the least since freed memory was returned."""

    def __init__(self) -> None:
        self._least = math.inf

    def return_beyond(self, growth: int) -> None:
        now = resident().now or 0
        if now > self._least + growth:
            return_freed_memory()
            self._least = now = resident().now or 0
        self._least = min(self._least, now)


_freed = _FreedMemory()


def return_freed_memory_beyond(growth: int) -> None:
    """Returns free pages if the process has grown by so many bytes since the last time. malloc cannot use every gap
    again, since torch asks for aligned memory, and takes new pages for what would fit; but a page that was returned
    costs a page fault when it is used again.
    """
    _freed.return_beyond(growth)
