"""Merges PEFT adapters into a base, one tensor at a time. The recipe's `merge` is here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qexport.records import added
from qexport.settings import Settings


class TrainedOn(Settings):
    """How training quantized the base: bitsandbytes' `load_in_4bit`, as in QLoRA (arXiv:2305.14314)."""

    quant_type: Literal["nf4", "fp4"]
    """`bnb_4bit_quant_type`: the code book. transformers' default is fp4; QLoRA's is nf4."""

    double_quant: bool
    """`bnb_4bit_use_double_quant`: whether the absmaxes were quantized too."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Values that share an absmax. transformers knows only 64."""

    skip_modules: list[str] | None = added()
    """`llm_int8_skip_modules`, if training set it: what was not quantized. Without it, only the head was not."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = added()
    """The dtype that training loaded the base in (`torch_dtype`), if it is not the stored one."""

    compute_dtype: Literal["float32", "float16", "bfloat16"] | None = added()
    """`bnb_4bit_compute_dtype`, if it is not that of the loaded base: the dequantized weights are rounded to it."""

    transformers: Literal[4, 5] = 5
    """The major version that training loaded the base with. Version 5 quantizes nothing of Falcon, whose layers are a
    subclass of `nn.Linear`; version 4 did."""


class MergeSettings(Settings):
    """How the adapter is merged into the base."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The merged model's dtype, which is the reference's. Merged in float32 and rounded once."""

    base: Literal["stored", "as_trained"] = added("stored")
    """The weights that the adapter is merged into: the stored ones, or what they were in training, rounded to 4 bits by
    bitsandbytes (`trained_on`). [merging.md](merging.md#an-adapter-that-was-trained-on-4-bits) says which to choose."""

    trained_on: TrainedOn | None = added()
    """How training quantized the base, for `base: as_trained`."""

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

    @model_validator(mode="after")
    def _says_how(self) -> MergeSettings:
        if self.base == "as_trained" and self.trained_on is None:
            raise ValueError("base: as_trained needs trained_on, for example {quant_type: nf4, double_quant: true}")
        if self.base == "stored" and self.trained_on is not None:
            raise ValueError("trained_on is only for base: as_trained: set that, or remove trained_on")
        return self
