"""Whether the files that a recipe names are there. Without torch, so that errors come within a second."""

from __future__ import annotations

from pathlib import Path

from qexport.errors import InputError
from qexport.loading.places import refuse_missing as refuse_missing_models
from qexport.recipe import Recipe
from qexport.references import DATASET_PREFIX


def refuse_missing(recipe: Recipe) -> None:
    """Looks for the base, the adapters and the texts that are on this machine. Reading says more of each.

    Raises:
        InputError: one is not there.
        RecipeError: a revision is given for a local folder.
    """
    refuse_missing_models(recipe.load)
    calibration = getattr(recipe.quantize, "calibration", None)
    texts = _listed(calibration.source) if calibration else []
    if recipe.verify is not None:
        texts += _listed(recipe.verify.text) + _listed(recipe.verify.prompts or [])
    for text in texts:
        if not text.startswith(DATASET_PREFIX) and not Path(text).exists():
            raise InputError("cannot be read: No such file or directory", where=text)


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)
