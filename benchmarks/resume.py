"""Kills runs on SmolLM2-135M at random moments until they end, and measures what the journal costs.

    python benchmarks/resume.py kills --kills 20
    python benchmarks/resume.py cost

`kills` ends with exit code 1 if a run that went on has other bytes than one that was not killed, or with GPTQ does more
than one block twice. `cost` prints the seconds of quantizing with and without the journal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qexport.pipeline import resuming, run
from qexport.progress import Notice, Progress
from qexport.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "cost"])
    parser.add_argument("overrides", nargs="*", help="values of the recipe, for example quantize.mse=false")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "gptq-4bit.yaml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    given = [*arguments.overrides, "verify=null", "export=[{layout: safetensors}]"]
    recipe = load_recipe(arguments.recipe, given)
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        if arguments.what == "cost":
            _cost(recipe, Path(folder))
        else:
            _kills(recipe, Path(folder), arguments.kills, random.Random(arguments.seed))


@dataclass(frozen=True)
class Ended:
    """A run in a process of its own.

    Attributes:
        status: of the process; 0 if the artifact was published.
        seconds: how long it took.
        steps: what was finished at each step of quantizing, with the seconds of the clock and of the processor.
    """

    status: int
    seconds: float
    steps: list[tuple[int, float, float]]


def _forked(recipe: Recipe, output: Path, *, limit: float | None = None) -> Ended:
    """A run in a fork of this process, which has imported everything and computed nothing.

    Args:
        recipe: the run's.
        output: where it publishes.
        limit: seconds until it is killed.
    """
    started = time.monotonic()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            run(recipe.model_copy(update={"output": str(output)}), device="cpu", progress=lambda e: _tell(writing, e))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    text = b"".join(_pieces(reading, child, None if limit is None else started + limit))
    os.close(reading)
    steps = [tuple(json.loads(line)) for line in text.splitlines()]
    return Ended(os.waitpid(child, 0)[1], time.monotonic() - started, steps)


def _tell(pipe: int, event: Progress | Notice) -> None:
    if isinstance(event, Progress) and event.stage in ("quantize", "export"):
        os.write(pipe, json.dumps([event.done, time.monotonic(), time.process_time()]).encode() + b"\n")


def _pieces(pipe: int, child: int, until: float | None) -> Iterator[bytes]:
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            until = None
        elif not (piece := os.read(pipe, 1 << 16)):
            return
        else:
            yield piece


def _kills(recipe: Recipe, folder: Path, kills: int, chance: random.Random) -> None:
    whole = _forked(recipe, folder / "whole")
    if whole.status:
        raise SystemExit("the run that is not killed has failed")
    print(f"not killed: {whole.seconds:.0f} s", flush=True)
    killed, twice, number = 0, 0, 0
    while killed < kills:
        number, last, output = number + 1, 0, folder / str(number)
        while not output.exists():
            limit = chance.uniform(0, whole.seconds / 2) if killed < kills else None
            ended = _forked(recipe, output, limit=limit)
            if ended.status:
                killed += 1
            if ended.steps:
                twice = max(twice, last - ended.steps[0][0])
                print(f"{last} were finished, went on after {ended.steps[0][0]}", flush=True)
                last = ended.steps[-1][0]
        whole_contents, own = _contents(folder / "whole"), _contents(output)
        if differing := sorted(name for name in whole_contents | own if whole_contents.get(name) != own.get(name)):
            raise SystemExit(f"a run that went on has other bytes in {', '.join(differing)}")
    print(f"{killed} kills in {number} runs, the same bytes, at most {twice} done twice")
    raise SystemExit(recipe.quantize.method == "gptq" and twice > 1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _cost(recipe: Recipe, folder: Path) -> None:
    for number in range(4):
        with _without_journal() if number % 2 else _with_journal():
            ended = _forked(recipe, folder / str(number))
        wall, processor = (ended.steps[-3][each] - ended.steps[0][each] for each in (1, 2))
        print(f"{'without' if number % 2 else 'with'} the journal: {processor:.2f} CPU s, {wall:.2f} s", flush=True)


@contextmanager
def _with_journal() -> Iterator[None]:
    yield


@contextmanager
def _without_journal() -> Iterator[None]:
    honest = resuming.RunJournal.units
    resuming.RunJournal.units = _no_units  # type: ignore[method-assign, assignment]
    yield
    resuming.RunJournal.units = honest  # type: ignore[method-assign]


@contextmanager
def _no_units(*_: object) -> Iterator[None]:
    yield None


if __name__ == "__main__":
    main()
