"""The recipe's `quantize`, one class a method. The union at the end is the registry of methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qexport.settings import Settings

Bits = Literal[2, 3, 4, 8]


def _check_group_size(group_size: int) -> int:
    if group_size != -1 and not 16 <= group_size <= 1024:
        raise ValueError(f"must be -1 or 16 to 1024, not {group_size}")
    return group_size


GroupSize = Annotated[int, AfterValidator(_check_group_size)]


class CalibrationSettings(Settings):
    """The text that the method looks at."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """Files (`.jsonl` with a `text` or `messages` field, or `.txt`), or `hub:org/dataset` (extra `datasets`)."""

    split: str = "train"
    """The split of a hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    field: str = "text"
    """The field of a JSON line that holds the text."""

    chat_template: bool = False
    """Render each text as a user's message (or its `messages`) with the model's chat template."""

    samples: Annotated[int, Field(ge=1)] = 128
    """How many windows to take."""

    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window."""

    packing: Literal["packed", "document"] = "packed"
    """`packed` joins documents with the end-of-text token and cuts windows; `document` takes one a sample."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Which documents come first."""


class Override(Settings):
    """Other settings for the modules that a pattern names."""

    modules: str
    """A shell-style pattern of module paths, for example `*.mlp.down_proj`. It must match something."""

    bits: Bits | None = None
    """Bits of one code, instead of the method's."""

    group_size: GroupSize | None = None
    """Inputs that share a scale, instead of the method's."""

    dense: bool = False
    """Leave these modules at 16 bits."""

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.dense == (self.bits is not None or self.group_size is not None):
            raise ValueError("give either dense: true, or bits and/or group_size")
        return self


class GptqSettings(Settings):
    """GPTQ (arXiv:2210.17323) with calibration data."""

    method: Literal["gptq"]
    """GPTQ: each column's rounding error is spread over the columns that are still to come."""

    bits: Bits = 4
    """Bits of one code."""

    group_size: GroupSize = 128
    """Inputs that share a scale and a zero point: 16 to 1024, or -1 for a whole row. Must divide the inputs of every
    layer."""

    sym: bool = True
    """Symmetric codes: every zero point is 2**(bits-1). vLLM and the fast kernels demand it."""

    desc_act: bool = False
    """Dynamic act-order: groups follow activation order. Slower to serve; vLLM refuses it. See `static_groups`."""

    static_groups: bool = True
    """Quantize columns by falling activation, with groups and scales fixed beforehand in the original order:
    act-order's gain in a plain `desc_act: false` file."""

    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (percdamp, dampening_frac)."""

    true_sequential: bool = True
    """Quantize the linears of a block one after the other, each with inputs from the quantized ones before."""

    mse: bool = True
    """Search the clipping range of each group, instead of taking its largest value."""

    on_failure: Literal["error", "round_to_nearest"] = "error"
    """What to do with a layer whose Hessian cannot be factorized at any damping. Recorded either way."""

    lm_head: bool = False
    """Quantize the output head too (never with tied embeddings)."""

    overrides: list[Override] = []
    """Per-module settings; the last that matches holds."""

    calibration: CalibrationSettings
    """The text that the Hessians are made from."""

    @model_validator(mode="after")
    def _possible(self) -> GptqSettings:
        if self.desc_act and self.static_groups:
            raise ValueError("desc_act and static_groups exclude each other: set static_groups: false with desc_act")
        return self


class NoneSettings(Settings):
    """No quantization: the merged model in `merge.dtype` is the artifact."""

    method: Literal["none"]
    """The merged weights as they are."""


class _Rounding(Settings):
    """What the methods that round each weight on its own have in common."""

    skip_modules: list[str] = []
    """Shell-style patterns of module paths that stay at 16 bits, for example `*.mlp.down_proj`. Each must match."""

    force_modules: list[str] = []
    """Patterns of modules to quantize although their family keeps them at 16 bits. Each must match such a module."""


class Nf4Settings(_Rounding):
    """bitsandbytes' 4 bits (arXiv:2305.14314), for transformers; no calibration data."""

    method: Literal["nf4"]
    """Codes from a code book of 16 values, blocks of the flattened matrix."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The code book: NormalFloat, or 4-bit floating point."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Values that share an absmax. transformers itself only makes 64, and reads all of them."""

    double_quant: bool = False
    """Quantize the absmaxes too, which saves 0.4 bits a weight."""

    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What transformers multiplies the dequantized weights in."""


class Int8Settings(_Rounding):
    """bitsandbytes' LLM.int8 (arXiv:2208.07339), for transformers; no calibration data."""

    method: Literal["int8"]
    """Symmetric int8 codes with one scale an output."""

    threshold: Annotated[float, Field(ge=0)] = 6.0
    """Activations above it are multiplied in 16 bits when serving (llm_int8_threshold)."""


class W8a8Settings(_Rounding):
    """int8 weights and activations (compressed-tensors `int-quantized`), for vLLM and TGI; no calibration data."""

    method: Literal["w8a8"]
    """Symmetric int8 weights with one scale an output; the server quantizes activations, one scale a token."""


RoundingSettings = Nf4Settings | Int8Settings | W8a8Settings
"""The methods that round each weight on its own."""

QuantizeSettings = Annotated[
    GptqSettings | Nf4Settings | Int8Settings | W8a8Settings | NoneSettings, Field(discriminator="method")
]
