"""Bits by layer against the same bits everywhere: mean KL divergence at equal size.

A recipe with `gptq` is run with each number of bits, and with `mixed` for the sizes that came out and those halfway
between.

    python benchmarks/mixed.py                                   # the demo's model, some 10 processor minutes a row
    python benchmarks/mixed.py --recipe mine.yaml --bits 3 4
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from cost import ROOT
from rich.console import Console
from rich.table import Table

from qexport import Mixed, Recipe, load_recipe, run

_OFFERED = (3, 4, 8, 16)


def main() -> None:
    """Runs both methods for each number of bits."""
    arguments = _arguments()
    recipe = load_recipe(arguments.recipe)
    table = Table("", "bits per weight", "mean KL divergence")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sizes = []
        for bits in arguments.bits:
            size, divergence = _measured(recipe, Path(scratch) / f"uniform-{bits}", bits=bits)
            table.add_row(f"{bits} bits everywhere", f"{size:.3f}", f"{divergence:.3g}")
            sizes.append(size)
        for target in sorted([*sizes[1:], *((one + other) / 2 for one, other in pairwise(sizes))]):
            changes = {"target": {"bits_per_weight": target}, "bits": list(_OFFERED), "method": "mixed"}
            size, divergence = _measured(recipe, Path(scratch) / f"mixed-{target:.3f}", **changes)
            table.add_row("by layer", f"{size:.3f}", f"{divergence:.3g}")
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/gptq-4bit.yaml"), help="with the method gptq")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--scratch", help="folder for the artifacts")
    return parser.parse_args()


def _measured(recipe: Recipe, output: Path, **changes: Any) -> tuple[float, float]:
    """Bits per weight and mean KL divergence, over all windows that the recipe allows and without gates."""
    print(f"{output.name} ...", file=sys.stderr)
    own = recipe.model_dump()
    quantize = own["quantize"]
    if "target" in changes:
        shared = {"calibration": quantize["calibration"], "group_sizes": [quantize["group_size"]]}
        method: Any = Mixed.model_validate(shared | changes)
    else:
        method = quantize | changes
    verify = own["verify"] | {"profile": "off", "gates": {}, "prompts": None, "windows": own["verify"]["max_windows"]}
    export = [{"layout": "safetensors"}]
    result = run(
        Recipe.model_validate(
            own | {"quantize": method, "export": export, "verify": verify, "release": None, "output": str(output)}
        )
    )
    figure = next(each for each in result.report.figures if each.name == "mean_kl" and each.domain is None)
    return result.manifest.sizes.bits_per_weight, figure.value


if __name__ == "__main__":
    main()
