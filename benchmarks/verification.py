"""What `qexport verify` costs beside the least that anybody does: the perplexity of both models, with transformers.

The plain script has no divergence, no intervals, no rivals, no noise floor and no continuations; it holds a whole model
in float32 and reads the same windows. It runs once a model.

    python benchmarks/verification.py --artifact out/gptq-4bit/safetensors
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cost import ROOT, Cost, measure
from rich.console import Console
from rich.table import Table

from qexport.recipe import load_recipe

HERE = Path(__file__).parent


def main() -> None:
    """Verifies, then measures the plain perplexities on as many windows."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        rows: dict[str, Cost] = {}
        for name, extra in (("text", ["verify.prompts=null"]), ("text and prompts", [])):
            print(f"qexport verify, {name} ...", file=sys.stderr)
            rows[f"qexport verify, {name}"] = measure(_verify(arguments, work, extra), work)
        report = json.loads((work / "report" / "report.json").read_text())
        _prepare(work, arguments, report["protocol"]["windows"])
        for name, kind, folder in (
            ("reference", "dense", work / "merged"),
            ("artifact", "packed", arguments.artifact),
        ):
            print(f"transformers, {name} ...", file=sys.stderr)
            command = [sys.executable, str(HERE / "perplexity.py"), str(work), kind, str(folder)]
            rows[f"transformers, {name}"] = measure(command, work)
        _show(rows, report)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=_folder, required=True, help="4-bit GPTQ, as the recipe makes it")
    parser.add_argument("--recipe", type=_folder, default=ROOT / "recipes/gptq-4bit.yaml")
    parser.add_argument("--scratch", help="folder for the merged model")
    return parser.parse_args()


def _folder(text: str) -> Path:
    return Path(text).resolve()


def _verify(arguments: argparse.Namespace, work: Path, extra: list[str]) -> list[str]:
    options = ["--reference", str(arguments.recipe), "--report", str(work / "report")]
    return [sys.executable, "-m", "qexport", "verify", str(arguments.artifact), *options, "verify.speed=null", *extra]


def _prepare(work: Path, arguments: argparse.Namespace, windows: int) -> None:
    """The merged model, and the windows that were measured."""
    recipe: dict[str, Any] = load_recipe(arguments.recipe, [f"verify.max_windows={windows}"]).model_dump(mode="json")
    recipe["verify"]["windows"] = min(recipe["verify"]["windows"], windows)
    (work / "prepare.yaml").write_text(json.dumps(recipe))
    subprocess.run([sys.executable, str(HERE / "prepare.py"), str(work)], check=True, cwd=work)


def _show(rows: dict[str, Cost], report: dict[str, Any]) -> None:
    plain = sum(cost.cpu for name, cost in rows.items() if name.startswith("transformers"))
    table = Table("", "wall s", "CPU s", "peak MB", "of both perplexities")
    for name, cost in rows.items():
        table.add_row(name, f"{cost.wall:.0f}", f"{cost.cpu:.0f}", f"{cost.peak_mb:.0f}", f"{cost.cpu / plain:.2f}")
    Console().print(table, f"verdict {report['verdict']}, looks at {report['protocol']['looks']} windows")


if __name__ == "__main__":
    main()
