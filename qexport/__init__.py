"""Merge, quantize, export and verify language models in one streaming pass.

    >>> import qexport
    >>> result = qexport.quantize(
    ...     "./my-model",
    ...     adapter="./my-adapter",
    ...     method=qexport.Gptq(bits=4, group_size=64),
    ...     calibration=["Some text.", "Some more text."],
    ...     layouts=["safetensors", "vllm"],
    ...     output="out/my-model-gptq",
    ... )
    >>> model = qexport.load("out/my-model-gptq/safetensors")

Names are imported when they are first used, so that `import qexport` is quick. docs/python.md describes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qexport.hidden_packages import hidden

if TYPE_CHECKING:
    from qexport.artifact.figures import Figure, GateResult, Verdict
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
    from qexport.export import OnnxSettings, SafetensorsSettings, TgiSettings, VllmSettings
    from qexport.gates import Bounds
    from qexport.loading import LoadSettings, WeightedAdapter
    from qexport.merge import MergeSettings
    from qexport.pipeline import Plan, Result, SweepResult, plan, quantize, run, sweep, verify
    from qexport.progress import Notice, Progress
    from qexport.quantizing.awq import Awq
    from qexport.quantizing.fp8 import Fp8
    from qexport.quantizing.gptq import Gptq, Override
    from qexport.quantizing.int8 import Int8
    from qexport.quantizing.method import CalibrationSettings
    from qexport.quantizing.mixed import Mixed, MixedTarget
    from qexport.quantizing.mxfp4 import Mxfp4
    from qexport.quantizing.nf4 import Nf4
    from qexport.quantizing.none import NoQuantization
    from qexport.quantizing.nvfp4 import Nvfp4
    from qexport.quantizing.w8a8 import W8a8
    from qexport.reading.stored_model import load
    from qexport.recipe import Recipe, load_recipe
    from qexport.recipe.sweep import load_sweep
    from qexport.verifying import SamplingSettings, SpeedSettings, TaskSettings, VerifySettings

    __version__: str

_NAMES = {
    "artifact.figures": ("Figure", "GateResult", "Verdict"),
    "artifact.manifest": ("Manifest",),
    "artifact.report": ("Report",),
    "errors": (
        "CompatibilityError",
        "GateFailed",
        "GateUndecided",
        "InputError",
        "NumericalError",
        "QexportError",
        "RecipeError",
        "ResourceError",
    ),
    "export": ("GgufSettings", "OnnxSettings", "SafetensorsSettings", "TgiSettings", "VllmSettings"),
    "gates": ("Bounds",),
    "loading": ("LoadSettings", "WeightedAdapter"),
    "merge": ("MergeSettings",),
    "pipeline": ("Plan", "Result", "SweepResult", "plan", "quantize", "run", "sweep", "verify"),
    "progress": ("Notice", "Progress"),
    "quantizing.awq": ("Awq",),
    "quantizing.fp8": ("Fp8",),
    "quantizing.gptq": ("Gptq", "Override"),
    "quantizing.int8": ("Int8",),
    "quantizing.method": ("CalibrationSettings",),
    "quantizing.mixed": ("Mixed", "MixedTarget"),
    "quantizing.mxfp4": ("Mxfp4",),
    "quantizing.nf4": ("Nf4",),
    "quantizing.none": ("NoQuantization",),
    "quantizing.nvfp4": ("Nvfp4",),
    "quantizing.w8a8": ("W8a8",),
    "reading.stored_model": ("load",),
    "recipe": ("Recipe", "load_recipe"),
    "recipe.sweep": ("load_sweep",),
    "verifying": ("SamplingSettings", "SpeedSettings", "TaskSettings", "VerifySettings"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Awq",
    "Bounds",
    "CalibrationSettings",
    "CompatibilityError",
    "Figure",
    "Fp8",
    "GateFailed",
    "GateResult",
    "GateUndecided",
    "GgufSettings",
    "Gptq",
    "InputError",
    "Int8",
    "LoadSettings",
    "Manifest",
    "MergeSettings",
    "Mixed",
    "MixedTarget",
    "Mxfp4",
    "Nf4",
    "NoQuantization",
    "Notice",
    "NumericalError",
    "Nvfp4",
    "OnnxSettings",
    "Override",
    "Plan",
    "Progress",
    "QexportError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "SafetensorsSettings",
    "SamplingSettings",
    "SpeedSettings",
    "SweepResult",
    "TaskSettings",
    "TgiSettings",
    "Verdict",
    "VerifySettings",
    "VllmSettings",
    "W8a8",
    "WeightedAdapter",
    "load",
    "load_recipe",
    "load_sweep",
    "plan",
    "quantize",
    "run",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        with hidden("kernels"):
            return getattr(import_module(f"qexport.{_PLACES[name]}"), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("qexport")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
