"""Merges PEFT adapters into a base, one tensor at a time. The recipe's `merge` is here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qexport.records import added
from qexport.settings import Settings


class MergeSettings(Settings):
    """How the adapter is merged into the base."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The merged model's dtype, which is the reference's. Merged in float32 and rounded once."""

    strict_base: bool = False
    """Refuse an adapter whose `base_model_name_or_path` differs from the base's name, instead of warning."""

    combination: Literal["linear", "ties", "dare_linear", "dare_ties", "cat"] = added("linear")
    """How several adapters (`load.adapters`) become one, as by PEFT's `add_weighted_adapter`: `linear` and `ties`
    combine their factors, `dare_*` after dropping random values; `cat` adds up what they change, at any ranks.
    """

    density: Annotated[float, Field(gt=0, le=1)] = added(0.5)
    """The share of values that `ties` and `dare_*` keep of each adapter."""

    seed: int = added(0)
    """For the values that `dare_*` drops."""
