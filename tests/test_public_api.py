"""The public surface: small, typed, lazily imported."""

from __future__ import annotations

import subprocess
import sys

import qexport


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(qexport, name) for name in qexport.__all__)
    assert set(qexport.__all__) == set(qexport._PLACES)


def test_the_surface_is_what_it_is_on_purpose() -> None:
    classes = {name: found for name in qexport.__all__ if isinstance(found := getattr(qexport, name), type)}
    errors = {name for name, found in classes.items() if issubclass(found, qexport.QexportError)}
    assert set(qexport.__all__) - errors == {
        "Manifest",
        "Plan",
        "Recipe",
        "Report",
        "Result",
        "load",
        "load_recipe",
        "plan",
        "run",
        "verify",
    }


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qexport; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
