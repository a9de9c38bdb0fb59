"""Merge, quantize, export and verify language models in one streaming pass.

    >>> import qexport
    >>> recipe = qexport.load_recipe("recipes/gptq-4bit.yaml", ["output=/tmp/model"])
    >>> result = qexport.run(recipe)
    >>> result.manifest.verification.value("mean_kl")
    >>> model = qexport.load("/tmp/model")

Names are imported when they are first used, so that `import qexport` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qexport.hidden_packages import hidden

if TYPE_CHECKING:
    from qexport.artifact.manifest import Manifest
    from qexport.artifact.report import Report
    from qexport.errors import (
        CompatibilityError,
        GateFailed,
        GateUndecided,
        InputError,
        NumericalError,
        QexportError,
        RecipeError,
        ResourceError,
    )
    from qexport.pipeline import Plan, Result, plan, run, verify
    from qexport.reading.model import load
    from qexport.recipe import Recipe, load_recipe

_PLACES = {
    "Manifest": "qexport.artifact.manifest",
    "Plan": "qexport.pipeline",
    "Recipe": "qexport.recipe",
    "Report": "qexport.artifact.report",
    "Result": "qexport.pipeline",
    "load": "qexport.reading.model",
    "load_recipe": "qexport.recipe",
    "plan": "qexport.pipeline",
    "run": "qexport.pipeline",
    "verify": "qexport.pipeline",
} | dict.fromkeys(
    (
        "CompatibilityError",
        "GateFailed",
        "GateUndecided",
        "InputError",
        "NumericalError",
        "QexportError",
        "RecipeError",
        "ResourceError",
    ),
    "qexport.errors",
)

__all__ = [
    "CompatibilityError",
    "GateFailed",
    "GateUndecided",
    "InputError",
    "Manifest",
    "NumericalError",
    "Plan",
    "QexportError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "load",
    "load_recipe",
    "plan",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        with hidden("kernels"):
            return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
