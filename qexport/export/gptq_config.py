"""What config.json and quantize_config.json say of GPTQ codes, in the words of AutoGPTQ and gptqmodel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from qexport.architectures.structure import Structure
from qexport.tensors import Gptq, GroupQuantizedSpec, OutputSpec, TensorSpec

Specs = Mapping[str, OutputSpec]
"""Every parameter that will leave the pass, by name."""


def gptq_config(method: Gptq, specs: Specs, structure: Structure) -> dict[str, Any]:
    """The `quantization_config` of an artifact.

    Modules that differ from `method` are named twice, because readers differ: gptqmodel and vLLM look at `dynamic`
    (a regular expression, `-:` before it for a dense module), transformers at `modules_in_block_to_quantize`, which
    cannot say that a module has other bits.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": method.bits,
        "group_size": method.group_size,
        "sym": method.sym,
        "desc_act": method.desc_act,
        "static_groups": method.static_groups,
        "damp_percent": method.damp_percent,
        "true_sequential": method.true_sequential,
        "lm_head": isinstance(specs.get(f"{structure.head}.weight"), GroupQuantizedSpec),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qexport:{version('qexport')}"]},
    }
    if dynamic := _dynamic(method, specs, structure):
        config["dynamic"] = dynamic
    if any(rule.startswith("-:") for rule in dynamic):
        config["modules_in_block_to_quantize"] = [_quantized_linears(specs, structure)]
    return config


def _dynamic(method: Gptq, specs: Specs, structure: Structure) -> dict[str, dict[str, int]]:
    """One rule for each path inside a block and each way in which it differs; no two rules match the same module."""
    blocks: dict[tuple[str, tuple[tuple[str, int], ...] | None], list[str]] = {}
    for block, linears in structure.linears.items():
        for linear in linears:
            difference = _difference(method, specs[f"{linear.name}.weight"])
            if difference != {}:
                key = (linear.name[len(block) :], None if difference is None else tuple(difference.items()))
                blocks.setdefault(key, []).append(block)
    return {
        _rule(names, suffix, dense=difference is None): dict(difference or ())
        for (suffix, difference), names in blocks.items()
    }


def _difference(method: Gptq, spec: OutputSpec) -> dict[str, int] | None:
    """What is not as in `method`; None for a dense module."""
    if isinstance(spec, TensorSpec):
        return None
    assert isinstance(spec, GroupQuantizedSpec)
    one_group = spec.group_size == spec.in_features
    same_groups = spec.group_size == method.group_size or (one_group and method.group_size == -1)
    difference = {}
    if spec.bits != method.bits:
        difference["bits"] = spec.bits
    if not same_groups:
        difference["group_size"] = -1 if one_group else spec.group_size
    return difference


def _rule(blocks: list[str], suffix: str, *, dense: bool) -> str:
    prefix = blocks[0].rpartition(".")[0]
    indices = "|".join(block.rpartition(".")[2] for block in blocks)
    return f"{'-:' if dense else ''}^{re.escape(prefix)}\\.({indices}){re.escape(suffix)}$"


def _quantized_linears(specs: Specs, structure: Structure) -> list[str]:
    linears = [linear.name for linear in structure.block_linears]
    return [name for name in linears if isinstance(specs[f"{name}.weight"], GroupQuantizedSpec)]
