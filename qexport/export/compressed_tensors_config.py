"""What config.json says of codes in the format compressed-tensors, in the words of its `QuantizationConfig`.

Only keys that readers since compressed-tensors 0.9 know are written: later ones are errors to older readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.architectures.structure import Structure
from qexport.tensors import GroupQuantizedSpec, Outputs, OutputSpec, QuantizedSpec, RowQuantizedSpec, TensorSpec

Scheme = tuple[int, int, bool, bool]
"""Bits, inputs in a group (-1: the whole row), symmetric, groups in activation order."""


def compressed_tensors_config(outputs: Outputs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact whose quantized layers are all of one kind.

    Where all layers have the same scheme, it holds for every `Linear` but those in `ignore`. Else each scheme names its
    modules.
    """
    schemes: dict[Scheme | None, list[str]] = {}
    for module, spec in outputs.quantized.items():
        schemes.setdefault(_scheme(spec), []).append(module)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": _weights(scheme),
            "input_activations": _token_activations() if scheme is None else None,
            "output_activations": None,
        }
        for index, (scheme, modules) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if None in schemes else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _dense(outputs.specs, structure),
    }


def _scheme(spec: QuantizedSpec) -> Scheme | None:
    """None for rows of int8 codes."""
    if isinstance(spec, RowQuantizedSpec):
        return None
    assert isinstance(spec, GroupQuantizedSpec)
    group_size = -1 if spec.group_size == spec.in_features else spec.group_size
    return spec.bits, group_size, spec.sym, spec.desc_act and spec.groups > 1


def _weights(scheme: Scheme | None) -> dict[str, Any]:
    bits, group_size, sym, desc_act = scheme or (8, -1, True, False)
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": "group" if desc_act else None,
    }


def _token_activations() -> dict[str, Any]:
    """Symmetric int8, one scale a token, found when serving."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _dense(specs: Mapping[str, OutputSpec], structure: Structure) -> list[str]:
    """Every module whose matrix stays as it is, and the head: a reader may make a `Linear` of a router, say."""
    dense = {
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if isinstance(spec, TensorSpec) and len(spec.shape) == 2 and name.endswith(".weight")
    }
    head = set() if isinstance(specs.get(f"{structure.head}.weight"), QuantizedSpec) else {structure.head}
    return sorted((dense | head) - {structure.embedding})
