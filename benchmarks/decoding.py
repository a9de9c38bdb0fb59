r"""Tokens per CPU second of one artifact as its users can load it, and of what it came from.

Greedy, batch 1, on one thread: decoding after a prompt of 64 tokens, and the first token after a prompt of 512. Rows
are the base with its adapter live in PEFT, the merged model in transformers, folders through `qexport.load` in its
modes, and a GPTQ folder through gptqmodel.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --base out/base/safetensors --adapter my-adapter \
        --merged out/merged/safetensors --gptq out/gptq-4bit/safetensors --folder nf4=out/nf4/safetensors \
        --gptqmodel /path/to/its/env/bin/python

Every measurement is a process of its own. All are measured in every round, one after the other, in the opposite order
in every second round, and a ratio compares what two did in the same round. CPU seconds, not those that pass, so that
other work on the machine counts less; it still takes caches and memory bandwidth, so compare ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost import ROOT
from generation import Figures, Rows, figures, in_turns, ratio, spread
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

SCRIPT = Path(__file__).parent / "peers" / "loaded_generation.py"
SHORT = 64
MERGED = "merged, transformers"


@dataclass(frozen=True)
class Contestant:
    """A folder, how it is loaded, and the environment that loads it."""

    way: str
    folder: Path
    python: str = sys.executable
    more: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Measures round after round and shows the table after each."""
    arguments = _arguments()
    contestants = _contestants(arguments)
    job = _job(arguments)
    rows: Rows = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for name in in_turns(contestants, number):
                rows[name].append(_figures(contestants[name], job, Path(scratch)))
            _show(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merged", type=Path, required=True, help="folder of the merged 16-bit model")
    parser.add_argument("--base", type=Path, help="folder of the 16-bit base, for PEFT")
    parser.add_argument("--adapter", type=Path, help="the LoRA adapter")
    parser.add_argument("--gptq", type=Path, help="GPTQ folder, loaded in every mode")
    parser.add_argument("--folder", action="append", default=[], type=_named, help="NAME=PATH of another artifact")
    parser.add_argument("--gptqmodel", help="interpreter of an environment with gptqmodel")
    parser.add_argument("--text", type=Path, default=ROOT / "calibration/heldout.jsonl", help="where prompts are from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt whose first token is timed")
    arguments = parser.parse_args()
    if bool(arguments.base) != bool(arguments.adapter):
        parser.error("--base and --adapter belong together")
    if arguments.gptqmodel and not arguments.gptq:
        parser.error("--gptqmodel needs --gptq")
    return arguments


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not (Path(path) / "config.json").is_file():
        raise argparse.ArgumentTypeError("NAME=PATH, with PATH a folder that has a config.json")
    return name, Path(path)


def _contestants(arguments: argparse.Namespace) -> dict[str, Contestant]:
    found = {MERGED: Contestant("transformers", arguments.merged)}
    if arguments.base:
        adapter = {"adapter": str(arguments.adapter.resolve())}
        found["base and adapter, PEFT"] = Contestant("peft", arguments.base, more=adapter)
    if arguments.gptq:
        found["GPTQ, kernel int4"] = _loaded(arguments.gptq, kernel="int4")
    for name, folder in [*([("GPTQ", arguments.gptq)] if arguments.gptq else []), *arguments.folder]:
        found[name] = _loaded(folder)
        found[f"{name}, cache=None"] = _loaded(folder, cache=None)
    if arguments.gptqmodel:
        found["GPTQ, gptqmodel"] = Contestant("gptqmodel", arguments.gptq, arguments.gptqmodel)
    return found


def _loaded(folder: Path, **options: str | None) -> Contestant:
    return Contestant("qexport", folder, more={"options": options})


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    """The prompts, with the merged model's tokenizer: all folders have the same."""
    text = "\n".join(json.loads(line)["text"] for line in arguments.text.read_text().splitlines())
    tokens = Tokenizer.from_file(str(arguments.merged / "tokenizer.json")).encode(text).ids[: arguments.long]
    if len(tokens) < arguments.long:
        raise SystemExit(f"--text has {len(tokens)} tokens, {arguments.long} are needed")
    kept = {"long": tokens, "short": tokens[:SHORT], "new_tokens": arguments.new_tokens}
    return {**kept, "threads": 1, "cpu_time": True}


def _figures(contestant: Contestant, job: dict[str, Any], work: Path) -> Figures:
    own = {"way": contestant.way, "folder": str(contestant.folder.resolve()), **contestant.more}
    return figures(contestant.python, SCRIPT, job | own, work)


def _show(rows: Rows) -> None:
    """Medians with minimum and maximum; the ratios are medians over the rounds."""
    table = Table("", "tokens per CPU s", "ratio", "first token, CPU s", "ratio", "peak MB")
    for name, row in rows.items():
        table.add_row(
            name,
            spread([each.speed for each in row], 1),
            ratio(row, rows[MERGED], lambda each: each.speed),
            spread([each.first_token for each in row], 2),
            ratio(row, rows[MERGED], lambda each: each.first_token),
            f"{statistics.median(each.peak_mb for each in row):.0f}",
        )
    Console(width=140).print(table, f"ratios refer to {MERGED}; {len(rows[MERGED])} rounds")


if __name__ == "__main__":
    main()
