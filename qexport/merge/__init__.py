"""Merges PEFT adapters into a base, one tensor at a time. The recipe's `merge` is here."""

from __future__ import annotations

from typing import Literal

from qexport.settings import Settings


class MergeSettings(Settings):
    """How the adapter is merged into the base."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The merged model's dtype, which is the reference's. Merged in float32 and rounded once."""

    strict_base: bool = False
    """Refuse an adapter whose `base_model_name_or_path` differs from the base's name, instead of warning."""
