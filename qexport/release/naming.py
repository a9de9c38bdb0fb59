"""How a release is called: by its model, version and method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qexport.artifact.manifest import MANIFEST_NAME, Manifest
from qexport.artifact.names import model_name, release_name
from qexport.errors import InputError, RecipeError
from qexport.release import ReleaseSettings


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


@dataclass(frozen=True)
class Source:
    """What an artifact's release is called after, known from its manifest, or before its run from the plan.

    Attributes:
        recipe: as it stands in the manifest.
        base: the base's name.
        adapter: the adapter's name; None if there is none.
        layout: the layout's name.
    """

    recipe: Mapping[str, Any]
    base: str
    adapter: str | None
    layout: str

    @classmethod
    def of(cls, manifest: Manifest) -> Source:
        """Of a finished artifact."""
        adapter = manifest.adapter.name if manifest.adapter else None
        return cls(manifest.recipe, manifest.base.name, adapter, manifest.layout)


def named(source: Source, *, model: str | None, version: str | None) -> Named:
    """The name of an artifact's release: as given, else as the recipe says, else base and adapter.

    Raises:
        RecipeError: nobody has named a version.
        InputError: the recipe in the manifest is malformed.
    """
    try:
        told = ReleaseSettings.model_validate(source.recipe.get("release") or {})
    except ValidationError as error:
        raise InputError(
            "the recipe in the manifest has a release that is malformed",
            where=f"{MANIFEST_NAME}: recipe.release",
            mend="give --name and --version of a release whose artifact you trust, or make the artifact again",
        ) from error
    version = version or told.version
    if version is None:
        raise RecipeError(
            "the release has no version",
            where="--version",
            mend="give --version 1.0.0, or release.version in the recipe",
        )
    found = model or told.name or model_name(source.base, source.adapter)
    return Named(found, version, method_name(source.recipe), source.layout)


def method_name(recipe: Mapping[str, Any]) -> str:
    """The method in a release's name, with the bits where a recipe chooses them: `gptq-4bit`, `nf4`; or the dtype of
    16-bit weights.
    """
    match recipe:
        case {"quantize": {"method": "gptq", "bits": int(bits)}}:
            return f"gptq-{bits}bit"
        case {"quantize": {"method": "awq"}}:
            return "awq-4bit"
        case {"quantize": {"method": "nf4", "quant_type": "nf4" | "fp4" as kind}}:
            return str(kind)
        case {"quantize": {"method": "none"}, "merge": {"dtype": "bfloat16" | "float16" | "float32" as dtype}}:
            return str(dtype)
        case {"quantize": {"method": "nvfp4" | "mxfp4" | "int8" | "w8a8" | "fp8" as method}}:
            return str(method)
        case _:
            raise InputError("the recipe in the manifest names no method of qexport", where=MANIFEST_NAME)
