"""What the benchmarks of generation share: contestants in turns, each in its own process, and the table's cells."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost import measure


@dataclass(frozen=True)
class Figures:
    """Of one process: tokens of decoding per second, seconds to the first token, 10^6 bytes, and the greedy tokens. The
    seconds are of the wall or of the processor, as the job says.
    """

    speed: float
    first_token: float
    peak_mb: float
    tokens: list[int]


Rows = dict[str, list[Figures]]


def in_turns(names: Iterable[str], number: int) -> Iterator[str]:
    """The contestants of a round, in the opposite order in every second one; says whose turn it is."""
    for name in list(names)[:: -1 if number % 2 else 1]:
        print(f"round {number + 1}: {name} ...", file=sys.stderr)
        yield name


def figures(python: str, script: Path, job: dict[str, Any], work: Path) -> Figures:
    """What a script measures: it is given the file with the job, and writes its result into another."""
    todo, result = work / "job.json", work / "result.json"
    todo.write_text(json.dumps(job))
    cost = measure([python, str(script), str(todo), str(result)], work)
    found = json.loads(result.read_text())
    result.unlink()
    return Figures(found["tokens_per_second"], found["first_token"], cost.peak_mb, found["tokens"])


def spread(values: list[float], digits: int) -> str:
    """The median, with minimum and maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(row: list[Figures], baseline: list[Figures], figure: Callable[[Figures], float]) -> str:
    """The median of what the two have in the same rounds."""
    return f"{statistics.median(figure(a) / figure(b) for a, b in zip(row, baseline, strict=True)):.2f}"
