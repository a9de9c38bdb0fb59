"""The part of a run that is measured: load, merge, quantize, export. Arguments as for prepare.py."""

from __future__ import annotations

import sys
from pathlib import Path

from recipe import make_recipe

from qexport.pipeline import run


def main() -> None:
    """Runs the recipe without its verification."""
    recipe = make_recipe(Path(sys.argv[1]), *sys.argv[2:])
    run(recipe.model_copy(update={"verify": None}))


if __name__ == "__main__":
    main()
