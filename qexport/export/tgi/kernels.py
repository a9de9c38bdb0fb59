"""Which kernel TGI uses for GPTQ codes, which shapes it takes, and into how many shards a model can be split.

Sources: `utils/quantization.py` and `layers/marlin/gptq.py` (Marlin), `layers/gptq/__init__.py` (the choice between
ExLlama and Triton), `layers/gptq/exllamav2.py`, `layers/gptq/triton.py`; for the shards
`models/custom_modeling/flash_*_modeling.py` (heads) and `utils/weights.py` (`get_sharded`, `get_packed_sharded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from qexport.export.tgi.families import OWN_MODELS, Backend, ServedLinear, Shape, backend, num_kv_heads

Kernel = Literal["marlin", "exllama", "triton"]

MARLIN_BITS: Final = (4, 8)
MARLIN_GROUP_SIZES: Final = (-1, 32, 64, 128)
_TRITON_BITS: Final = (2, 4, 8)
_TRITON_INPUTS: Final = 128
_EXLLAMA_STEP: Final = 32


@dataclass(frozen=True)
class Codes:
    """What TGI reads in config.json about GPTQ codes.

    Attributes:
        bits: bits per code.
        group_size: inputs per group; -1 for one group per row.
        sym: every zero point is 2**(bits - 1), according to config.json.
        desc_act: the groups follow activation order.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @property
    def uses_marlin(self) -> bool:
        """Whether TGI uses Marlin, which it then does for every layer, whatever the shapes."""
        return self.sym and self.bits in MARLIN_BITS and self.group_size in MARLIN_GROUP_SIZES


def kernel(codes: Codes, linear: ServedLinear) -> Kernel:
    """The kernel that TGI uses for a layer on CUDA, even if that kernel cannot compute the layer."""
    if codes.uses_marlin:
        return "marlin"
    return "exllama" if codes.bits == 4 and not codes.desc_act and not linear.packed else "triton"


def fault(codes: Codes, linear: ServedLinear, degree: int = 1) -> str | None:
    """Why TGI cannot compute a layer, or would compute it wrongly; None if it can.

    Args:
        codes: as config.json describes them.
        linear: the layer.
        degree: the number of shards.
    """
    shape = linear.sharded(degree)
    if shape is None:
        return f"{linear.shape} cannot be divided by {degree}"
    if codes.group_size != -1 and shape[1] % codes.group_size:
        return f"{shape[1]} inputs are no multiple of the group size {codes.group_size}"
    if shape[1] * codes.bits % 32:
        return f"{shape[1]} inputs of {codes.bits} bits do not fill int32 words"
    if not codes.uses_marlin and any(
        out // (1 if linear.row else degree) * codes.bits % 32 for out, _ in linear.shapes
    ):
        return f"the zero points of {shape[0]} outputs cannot be divided into int32 words"
    return _FAULTS[kernel(codes, linear)](codes, shape)


def choose_sym(codes: Codes, linears: Iterable[ServedLinear]) -> tuple[Codes, str]:
    """The value of `sym` with which TGI can compute all layers. The tensors do not depend on it.

    Args:
        codes: as they were made; `sym` stays false if it is.
        linears: of the model.

    Returns:
        The codes as config.json should describe them, and the reason. If no kernel takes a layer, it still has a fault.
    """
    if not codes.sym:
        return codes, "the zero points differ"
    if not codes.uses_marlin:
        return codes, f"Marlin takes no {codes.bits} bits in groups of {codes.group_size}"
    refused = next((reason for linear in linears if (reason := fault(codes, linear))), None)
    if refused is None:
        return codes, "Marlin takes every layer"
    return replace(codes, sym=False), refused


def _marlin_fault(codes: Codes, shape: Shape) -> str | None:
    """See `_check_valid_shape` in layers/marlin/gptq.py."""
    out_features, in_features = shape
    if (in_features % 128 or out_features % 64) and (in_features % 64 or out_features % 128):
        return f"Marlin takes no {out_features} x {in_features}: needs multiples of (64, 128) or (128, 64)"
    return None


def _exllama_fault(codes: Codes, shape: Shape) -> str | None:
    """The kernel processes 32 inputs at a time, and loads the next group's scales only after them."""
    out_features, in_features = shape
    if in_features % _EXLLAMA_STEP or out_features % _EXLLAMA_STEP:
        return f"ExLlama takes no {out_features} x {in_features}: needs multiples of {_EXLLAMA_STEP}"
    if codes.group_size % _EXLLAMA_STEP and codes.group_size != -1:
        return f"ExLlama takes no groups of {codes.group_size}: needs multiples of {_EXLLAMA_STEP}"
    return None


def _triton_fault(codes: Codes, shape: Shape) -> str | None:
    """The kernel loads inputs without a mask, and its largest tile has 128 of them."""
    if codes.bits not in _TRITON_BITS:
        return f"no kernel of TGI takes {codes.bits} bits"
    if shape[1] % _TRITON_INPUTS:
        return f"Triton, which TGI would take, reads past the end of {shape[1]} inputs: no multiple of {_TRITON_INPUTS}"
    return None


_FAULTS: Final = {"marlin": _marlin_fault, "exllama": _exllama_fault, "triton": _triton_fault}


LARGEST_DEGREE: Final = 16


def degrees(config: Mapping[str, Any], linears: Sequence[ServedLinear], codes: Codes | None) -> list[int]:
    """The tensor-parallel degrees from 1 to 16 that work; only 1 if qexport does not know the family's rules.

    Args:
        config: the result of `tgi_config`.
        linears: of the model.
        codes: GPTQ codes as config.json describes them; None for other weights.
    """
    if backend(config) is not Backend.OWN or not OWN_MODELS[config["model_type"]].row:
        return [1]
    return [degree for degree in range(1, LARGEST_DEGREE + 1) if _works(degree, config, linears, codes)]


def _works(degree: int, config: Mapping[str, Any], linears: Sequence[ServedLinear], codes: Codes | None) -> bool:
    if degree == 1:
        return True
    if config["model_type"] == "falcon":
        return _falcon_heads(degree, config) and _layers(degree, linears, codes)
    heads = config["num_attention_heads"], num_kv_heads(config)
    experts = (config["intermediate_size"],) if "num_local_experts" in config else ()
    return not any(count % degree for count in (*heads, *experts)) and _layers(degree, linears, codes)


def _falcon_heads(degree: int, config: Mapping[str, Any]) -> bool:
    """Whether Falcon's heads can be split. The old decoder's cannot: TGI cuts query_key_value into equal parts, but
    reads each part as if it had the keys and values of all heads.
    """
    return bool(config["new_decoder_architecture"]) and not num_kv_heads(config) % degree


def _layers(degree: int, linears: Sequence[ServedLinear], codes: Codes | None) -> bool:
    if codes is None:
        return all(linear.sharded(degree) for linear in linears)
    return all(fault(codes, linear, degree) is None for linear in linears)
