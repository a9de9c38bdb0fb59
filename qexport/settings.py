"""The base of every part of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A part of a recipe: unknown keys are errors, types are strict, numbers finite, instances immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def required_in_recipes(*fields: str) -> Callable[[dict[str, Any]], None]:
    """For a part's JSON Schema: fields that a recipe must name although they have a default in Python.

    In Python the class names the method or the layout, and calibration text is a separate argument.
    """

    def mark(schema: dict[str, Any]) -> None:
        found = schema["properties"]
        schema["required"] = [*(name for name in fields if name in found), *schema.get("required", ())]
        for name in fields:
            if found.get(name, {}).pop("default", "") is None:
                (reference, _null) = found[name].pop("anyOf")
                found[name] = {**reference, **found[name]}

    return mark
