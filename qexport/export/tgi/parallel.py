"""Into how many shards TGI can split a model.

Sources: `models/custom_modeling/flash_*_modeling.py` (heads), `utils/weights.py` (`get_sharded`, `get_packed_sharded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from qexport.export.tgi.config import num_kv_heads
from qexport.export.tgi.families import OWN_MODELS, Backend, backend
from qexport.export.tgi.kernels import Codes, fault
from qexport.export.tgi.linears import ServedLinear

LARGEST_DEGREE: Final = 16


def degrees(config: Mapping[str, Any], linears: Sequence[ServedLinear], codes: Codes | None) -> list[int]:
    """The tensor-parallel degrees from 1 to 16 that work; 1 alone where qexport does not know the family's rules.

    Args:
        config: as `tgi_config` has made it.
        linears: the model's.
        codes: what config.json says of GPTQ codes; None for other weights.
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
    """The old decoder's query_key_value is cut into equal parts, but the parts are read as if each held the keys and
    values of all heads: it cannot be split.
    """
    return bool(config["new_decoder_architecture"]) and not num_kv_heads(config) % degree


def _layers(degree: int, linears: Sequence[ServedLinear], codes: Codes | None) -> bool:
    if codes is None:
        return all(linear.sharded(degree) for linear in linears)
    return all(fault(codes, linear, degree) is None for linear in linears)
