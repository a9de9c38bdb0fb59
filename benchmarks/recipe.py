"""The benchmark's job as a recipe."""

from __future__ import annotations

from pathlib import Path

from qexport.export.settings import SafetensorsSettings
from qexport.load.settings import LoadSettings
from qexport.quantize.settings import CalibrationSettings, GptqSettings
from qexport.recipe.model import Recipe
from qexport.verify.settings import VerifySettings


def make_recipe(work: Path, base: str, adapter: str, calibration: str, held_out: str, windows: str) -> Recipe:
    """4 bits, symmetric, group 64, 64 windows of 512 tokens; everything else as a user finds it."""
    return Recipe(
        load=LoadSettings(base=base, adapter=adapter or None),
        quantize=GptqSettings(
            method="gptq",
            bits=4,
            group_size=64,
            calibration=CalibrationSettings(source=calibration, samples=64, sequence_length=512),
        ),
        export=[SafetensorsSettings(layout="safetensors")],
        verify=VerifySettings(text=held_out, windows=int(windows), sequence_length=512),
        output=str(work / "qexport"),
    )
