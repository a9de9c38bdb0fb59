"""What a process takes, as the kernel counts it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cost:
    """Seconds, and the peak of resident memory in 10^6 bytes, imports included.

    A process that starts out of a larger one is given that one's peak, so small peaks say nothing here.
    """

    wall: float
    cpu: float
    peak_mb: float


def measure(command: list[str], work: Path) -> Cost:
    """Runs a process to its end in `work` (some write logs). What it prints goes to stderr."""
    start = os.times().elapsed
    process = subprocess.Popen(command, stdout=sys.stderr, cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[1]} ended with {process.returncode}")
    return spent(start, usage)


def spent(start: float, usage: resource.struct_rusage) -> Cost:
    """What a process that began at `start`, in seconds of `os.times().elapsed`, and has ended now took."""
    wall = os.times().elapsed - start
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)  # Linux counts KiB
