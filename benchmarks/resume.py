"""Kills runs on SmolLM2-135M at random moments until they end, and measures what the journal costs.

    python benchmarks/resume.py kills --kills 20
    python benchmarks/resume.py cost

`kills` ends with exit code 1 if a resumed run has other bytes than one that was not killed, or does more than one block
twice. `cost` prints the seconds of quantizing with and without the journal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "gptq-4bit.yaml"


def main() -> None:
    """Runs one of the two, or a run as a child of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "cost", "child"])
    parser.add_argument("overrides", nargs="*", help="values of the recipe, for example quantize.mse=false")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--without-journal", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    {"kills": _kills, "cost": _cost, "child": _child}[arguments.what](arguments)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return [
        f"output={arguments.output}",
        "verify=null",
        "export=[{layout: safetensors}, {layout: vllm}]",
        f"quantize.calibration.samples={arguments.samples}",
        f"quantize.calibration.sequence_length={arguments.sequence_length}",
        *arguments.overrides,
    ]


def _child(arguments: argparse.Namespace) -> None:
    """A run that prints the number of finished blocks, and the clocks, at each step of quantizing."""
    from qexport.pipeline import resuming, run
    from qexport.progress import Notice, Progress
    from qexport.recipe import load_recipe

    if arguments.without_journal:
        resuming.RunJournal.units = _no_units  # type: ignore[method-assign, assignment]

    def tell(event: Progress | Notice) -> None:
        if isinstance(event, Progress) and event.stage in ("quantize", "export"):
            print(json.dumps([event.stage, event.done, time.process_time(), time.monotonic()]), flush=True)

    run(load_recipe(RECIPE, _overrides(arguments)), device="cpu", progress=tell)


@contextmanager
def _no_units(*_: object) -> Iterator[None]:
    yield None


def _start(arguments: argparse.Namespace, output: Path, *options: str) -> subprocess.Popen[str]:
    own = ["child", *arguments.overrides, "--output", str(output), "--samples", str(arguments.samples)]
    own += ["--sequence-length", str(arguments.sequence_length), *options]
    return subprocess.Popen([sys.executable, __file__, *own], stdout=subprocess.PIPE, text=True)


def _events(child: subprocess.Popen[str]) -> list[tuple[str, int, float, float]]:
    assert child.stdout is not None
    return [tuple(json.loads(line)) for line in child.stdout]


def _kills(arguments: argparse.Namespace) -> None:
    chance, killed, twice = random.Random(arguments.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        whole = Path(folder, "whole")
        started = time.monotonic()
        if _finish(_start(arguments, whole))[0]:
            raise SystemExit("the run that is not killed has failed")
        seconds = time.monotonic() - started
        print(f"not killed: {seconds:.0f} s", flush=True)
        for number in range(arguments.kills):
            output, last = Path(folder, str(number)), 0
            while True:
                limit = chance.uniform(0, seconds / 2) if killed < arguments.kills else None
                code, done = _finish(_start(arguments, output), limit)
                if done:
                    twice = max(twice, last - done[0])
                    print(f"began after block {done[0]}, of {last} that were finished", flush=True)
                    last = done[-1]
                if code == 0 or output.exists():  # the kill may come after the rename
                    break
                killed += 1
            if _contents(output) != _contents(whole):
                raise SystemExit("a run that went on has other bytes")
            if killed >= arguments.kills:
                break
    print(f"{killed} kills, the same bytes, at most {twice} blocks twice")
    raise SystemExit(twice > 1)


def _finish(child: subprocess.Popen[str], limit: float | None = None) -> tuple[int, list[int]]:
    """Waits for a run, or kills it after some seconds. Its exit code, and the steps of quantizing."""
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        child.kill()
    events = _events(child)
    return child.wait(), [done for stage, done, _, _ in events if stage == "quantize"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _cost(arguments: argparse.Namespace) -> None:
    for _ in range(2):
        for options in ((), ("--without-journal",)):
            with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
                child = _start(arguments, Path(folder, "out"), *options)
                print(_seconds(_events(child)), *options, flush=True)
                child.wait()


def _seconds(events: Sequence[tuple[str, int, float, float]]) -> str:
    first, last = events[0], next(event for event in events if event[0] == "export")
    return f"{last[2] - first[2]:.2f} CPU s, {last[3] - first[3]:.2f} s"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
