"""A sweep against separate runs of its variants: processor seconds, and whether the manifests are the same.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py recipes/sweep.yaml --keep all best

Each run and each sweep is a process of its own, which is what a user starts. Further arguments replace values of the
recipe, as for `qexport sweep`. The sweeps come first, then every variant alone; all begin with nothing made.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.sweep import SweepRecord
from qexport.recipe.sweep import Variant, load_sweep


@dataclass(frozen=True)
class Made:
    """What a process has made.

    Attributes:
        folder: its output.
        seconds: of the processor, with those of its own processes.
    """

    folder: Path
    seconds: float


def main() -> None:
    """Prints a row for each variant, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--keep", nargs="+", choices=["all", "best"], default=["all", "best"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweeps = {keep: swept(arguments.sweep, arguments.overrides, keep, Path(folder)) for keep in arguments.keep}
        loaded = load_sweep(arguments.sweep, arguments.overrides)
        alone = {each.name: run_alone(loaded.recipe, each, Path(folder)) for each in loaded.variants}
        Console(width=140).print(table_of(sweeps, alone))


def swept(file: Path, overrides: Sequence[str], keep: str, folder: Path) -> Made:
    """All variants by one command."""
    output = folder / f"keep-{keep}"
    return Made(output, seconds_of(["sweep", str(file), *overrides, "--keep", keep, "--output", str(output)]))


def run_alone(recipe: Path, variant: Variant, folder: Path) -> Made:
    """One variant by a command of its own."""
    output = folder / "alone" / variant.name
    return Made(output, seconds_of(["run", str(recipe), *variant.overrides, "--output", str(output)]))


def seconds_of(arguments: Sequence[str]) -> float:
    """Processor seconds of a command. Gates that do not pass are no failure here."""
    before = used()
    code = subprocess.run(
        [sys.executable, "-m", "qexport", *arguments], stdout=subprocess.DEVNULL, check=False
    ).returncode
    if code not in (0, 6, 7):
        raise SystemExit(f"qexport {' '.join(arguments)} ended with {code}")
    return used() - before


def used() -> float:
    """Processor seconds of all processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def table_of(sweeps: dict[str, Made], alone: dict[str, Made]) -> Table:
    """Processor seconds of each variant in each sweep and alone; in the last row of all, and the share of the sweep."""
    records = {keep: SweepRecord.read(made.folder) for keep, made in sweeps.items()}
    table = Table("CPU s", *(f"keep: {keep}" for keep in sweeps), "alone", "same manifest")
    for name, own in alone.items():
        row = []
        for record in records.values():
            variant = record.variant(name) if record else None
            row.append(
                f"{variant.cost.cpu_seconds:.0f}" if variant and variant.cost else variant.state if variant else ""
            )
        table.add_row(name, *row, f"{own.seconds:.0f}", same(name, own, list(sweeps.values())))
    total = sum(own.seconds for own in alone.values())
    shares = (f"{made.seconds:.0f} ({made.seconds / total:.2f})" for made in sweeps.values())
    table.add_row("all", *shares, f"{total:.0f}", "")
    return table


def same(name: str, own: Made, sweeps: Sequence[Made]) -> str:
    """Whether every sweep that kept a variant has the manifest that it has alone."""
    kept = [manifest for made in sweeps for manifest in manifests(made.folder / name)]
    return "" if not kept else "yes" if {*kept} == {*manifests(own.folder)} else "NO"


def manifests(folder: Path) -> list[bytes]:
    """Of an artifact, also one that was rejected."""
    places = (folder, folder.with_name(f"{folder.name}.rejected"))
    return [path.read_bytes() for place in places for path in sorted(place.glob(f"**/{MANIFEST_NAME}"))]


if __name__ == "__main__":
    main()
