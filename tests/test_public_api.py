"""The public surface: small, typed, lazily imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import qexport


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(qexport, name) for name in qexport.__all__)
    assert set(qexport.__all__) == set(qexport._PLACES)
    rooms = {path.stem for path in Path(qexport.__file__).parent.iterdir()}
    assert not rooms & set(qexport.__all__), "an imported room would hide the name"


def test_the_surface_is_what_it_is_on_purpose() -> None:
    classes = {name: found for name in qexport.__all__ if isinstance(found := getattr(qexport, name), type)}
    errors = {name for name, found in classes.items() if issubclass(found, qexport.QexportError)}
    assert set(qexport.__all__) - errors == {
        "Awq",
        "Bounds",
        "CalibrationSettings",
        "Figure",
        "Fp8",
        "GateResult",
        "Gptq",
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
        "Nvfp4",
        "GgufSettings",
        "OnnxSettings",
        "Override",
        "Plan",
        "Progress",
        "Recipe",
        "Report",
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
    }


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qexport; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
