"""How a release is called: by its model, version and method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qexport.artifact.manifest import Manifest
from qexport.artifact.names import model_name, release_name
from qexport.errors import RecipeError


@dataclass(frozen=True)
class Named:
    """How a release is called.

    Attributes:
        model: without version and method.
        version: for example `1.4.0`.
        method: for example `gptq-4bit`.
        layout: the layout's name.
    """

    model: str
    version: str
    method: str
    layout: str

    @property
    def name(self) -> str:
        """The whole name."""
        return release_name(self.model, self.version, self.method, self.layout)


def named(manifest: Manifest, *, model: str | None, version: str | None) -> Named:
    """The name of an artifact's release: as given, else as the recipe says, else base and adapter.

    Raises:
        RecipeError: nobody has named a version.
    """
    told: dict[str, Any] = manifest.recipe.get("release") or {}
    version = version or told.get("version")
    if version is None:
        raise RecipeError(
            "the release has no version",
            where="--version",
            mend="give --version 1.0.0, or release.version in the recipe",
        )
    adapter = manifest.adapter.name if manifest.adapter else None
    found = model or told.get("name") or model_name(manifest.base.name, adapter)
    return Named(found, version, method_name(manifest), manifest.layout)


def method_name(manifest: Manifest) -> str:
    """The method in a release's name: `gptq-4bit`, `nf4`, `int8`, `w8a8`, or the dtype of 16-bit weights."""
    quantize = manifest.recipe["quantize"]
    match quantize["method"]:
        case "gptq":
            return f"gptq-{quantize['bits']}bit"
        case "nf4":
            return str(quantize["quant_type"])
        case "none":
            return str(manifest.recipe["merge"]["dtype"])
        case other:
            return str(other)
