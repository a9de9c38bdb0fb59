"""Writes what every tool of the benchmark starts from: the merged model, and the token windows.

Usage: prepare.py WORK, with WORK/prepare.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from qexport.pipeline import plan
from qexport.pipeline.texts import read_texts
from qexport.recipe import load_recipe


def main() -> None:
    """Merges, tokenizes, writes."""
    work = Path(sys.argv[1])
    recipe = load_recipe(work / "prepare.yaml")
    planned = plan(recipe)
    checkpoint = planned.merged.checkpoint
    texts = read_texts(recipe, checkpoint, planned.structure)
    assert texts.evaluation is not None
    tokens = {"held_out": texts.evaluation.held_out.input_ids.tolist()}
    if texts.calibration is not None:
        tokens["calibration"] = texts.calibration.input_ids.tolist()
    (work / "tokens.json").write_text(json.dumps(tokens))
    merged = work / "merged"
    merged.mkdir()
    tensors = {name: checkpoint.weights.read(name) for name in checkpoint.weights.specs()}
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    for name, content in checkpoint.files.items():
        (merged / name).write_bytes(content)


if __name__ == "__main__":
    main()
