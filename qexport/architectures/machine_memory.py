"""How much memory the machine has, and how much of it is free: its main memory, and that of its accelerator."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

import torch

from qexport.architectures.memory import budget, resident

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> float:
    """Bytes that can be allocated without swapping: on the accelerator, including what torch has reserved and does not
    use; or in main memory, within the limits of the control group and of the recipe.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_free_in_system(), _free_in_control_group(), budget().limit - (resident().now or 0))


def total_memory() -> float:
    """Bytes of the machine's main memory, or of the control group if that is limited to less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _lines(_CGROUP / "memory.max")
    return machine if limit in ([], ["max"]) else min(machine, int(limit[0]))


def _free_in_system() -> int:
    fields = dict(line.split(":", 1) for line in _lines(_MEMINFO))
    if "MemAvailable" in fields:
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_control_group() -> float:
    """What a container's limit leaves; cached file pages that can be dropped do not count as used."""
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if not used or limit in ([], ["max"]):
        return math.inf
    statistics = dict(line.split() for line in _lines(_CGROUP / "memory.stat"))
    return int(limit[0]) - int(used[0]) + int(statistics.get("inactive_file", 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
