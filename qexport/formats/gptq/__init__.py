"""GPTQ codes as AutoGPTQ v1 stores them: writing. Reading is in `reading`, the bit layout in `tensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

import torch

from qexport.architectures.joined import joined_modules, joined_name
from qexport.architectures.structure import Structure
from qexport.formats.format import Card, ModuleEncoding, Specs
from qexport.formats.gptq.reading import GptqReader
from qexport.formats.gptq.second_config import CONFIG_FILE
from qexport.formats.gptq.tensors import check_shape, pack, packed_specs
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, OutputSpec, Quantized, QuantizedSpec, TensorSpec


@dataclass(frozen=True)
class GptqFormat(ModuleEncoding):
    """AutoGPTQ v1, with the settings in quantize_config.json. Single modules may differ in bits and group_size.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; -1 for one group per row.
        sym: every zero point is 2**(bits - 1).
        desc_act: the groups follow activation order.
        static_groups: columns were solved in activation order, with groups in the original order.
        damp_percent: the damping, as a fraction of the mean of the Hessian's diagonal.
        true_sequential: each linear was quantized with inputs from the quantized linears before it.
        other_bits: those of layers that were chosen one by one, for the card.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    static_groups: bool
    damp_percent: float
    true_sequential: bool
    other_bits: tuple[int, ...] = ()

    quant_method: ClassVar[str | None] = "gptq"
    config_file: ClassVar[str | None] = CONFIG_FILE
    holds: ClassVar = (GroupQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """qweight, qzeros, scales and g_idx."""
        assert isinstance(spec, GroupQuantizedSpec)
        return packed_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """qweight, qzeros, scales and g_idx."""
        assert isinstance(value, GroupQuantized)
        return pack(value)

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes must fill whole int32 words."""
        assert isinstance(spec, GroupQuantizedSpec)
        return check_shape(spec.out_features, spec.in_features, spec.bits, spec.group_size)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` of an artifact.

        Modules that differ from it are named twice, because loaders differ: gptqmodel and vLLM read `dynamic`
        (regular expressions, with the prefix `-:` for unquantized modules), transformers reads
        `modules_in_block_to_quantize`, which cannot give a module other bits.
        """
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "static_groups": self.static_groups,
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
            "lm_head": isinstance(specs.get(f"{structure.head}.weight"), GroupQuantizedSpec),
            "pack_dtype": "int32",
            "meta": {"quantizer": [_quantizer()]},
        }
        if dynamic := _dynamic(self, specs, structure):
            config["dynamic"] = dynamic
        if any(rule.startswith("-:") for rule in dynamic):
            config["modules_in_block_to_quantize"] = [_quantized_linears(specs, structure)]
        return config

    @property
    def card(self) -> Card:
        """The format on the model card."""
        groups = "one group per row" if self.group_size == -1 else f"groups of {self.group_size}"
        kind = "symmetric" if self.sym else "asymmetric"
        if not self.other_bits:
            return Card("gptq", f"GPTQ {self.bits}-bit", f"{self.bits}-bit GPTQ codes in {groups}, {kind}")
        bits = sorted({self.bits, *self.other_bits})
        title = f"GPTQ {bits[0]}- to {bits[-1]}-bit"
        most = f"most of {self.bits} bits in {groups}, {kind}"
        return Card("gptq", title, f"GPTQ codes of {', '.join(map(str, bits))} bits, chosen by layer, {most}")

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is gptq."""
        return config is not None and config.get("quant_method") == cls.quant_method

    @staticmethod
    def reader(config: Mapping[str, Any]) -> GptqReader:
        """See `GptqReader`."""
        return GptqReader(config)


@cache
def _quantizer() -> str:
    """The maker that a config names. The package's metadata is read once: a plan makes a config several times."""
    return f"qexport:{version('qexport')}"


_Difference = tuple[tuple[str, int], ...] | None
"""The settings that differ from the common ones; None for an unquantized module."""


def _dynamic(common: GptqFormat, specs: Specs, structure: Structure) -> dict[str, dict[str, int]]:
    """One rule per path inside a block and per difference, and one for a quantized head that differs; no two rules
    match the same module.

    vLLM looks siblings up by the name of the layer that it makes of them, so the rule of the first matches that too.
    """
    blocks: dict[tuple[str, _Difference], list[str]] = {}
    for block, linears in structure.linears.items():
        found = {linear.name: _difference(common, specs[f"{linear.name}.weight"]) for linear in linears}
        together = joined_modules({linear.name: None for linear in linears if not linear.expert})
        alike = {group[0] for group in together if len({found[name] for name in group}) == 1}
        for name, difference in found.items():
            if difference != ():
                inside = _inside_block(name[len(block) :], or_joined=name in alike)
                blocks.setdefault((inside, difference), []).append(block)
    rules = {
        _rule(names, inside, unquantized=difference is None): dict(difference or ())
        for (inside, difference), names in blocks.items()
    }
    head = specs.get(f"{structure.head}.weight")
    if isinstance(head, GroupQuantizedSpec) and (difference := _difference(common, head)):
        rules[f"^{re.escape(structure.head)}$"] = dict(difference)
    return rules


def _inside_block(path: str, *, or_joined: bool) -> str:
    """A regular expression for a path inside a block, or for that of the layer that servers make of it."""
    parent, _, leaf = path.rpartition(".")
    joined = joined_name(path) if or_joined else None
    return re.escape(f"{parent}.") + (f"({leaf}|{joined.rpartition('.')[2]})" if joined else re.escape(leaf))


def _difference(common: GptqFormat, spec: OutputSpec) -> _Difference:
    if isinstance(spec, TensorSpec):
        return None
    assert isinstance(spec, GroupQuantizedSpec)
    one_group = spec.group_size == spec.in_features
    same_groups = spec.group_size == common.group_size or (one_group and common.group_size == -1)
    difference = {}
    if spec.bits != common.bits:
        difference["bits"] = spec.bits
    if not same_groups:
        difference["group_size"] = -1 if one_group else spec.group_size
    return tuple(difference.items())


def _rule(blocks: list[str], inside: str, *, unquantized: bool) -> str:
    prefix = blocks[0].rpartition(".")[0]
    indices = "|".join(block.rpartition(".")[2] for block in blocks)
    return f"{'-:' if unquantized else ''}^{re.escape(prefix)}\\.({indices}){inside}$"


def _quantized_linears(specs: Specs, structure: Structure) -> list[str]:
    linears = [linear.name for linear in structure.block_linears]
    return [name for name in linears if isinstance(specs[f"{name}.weight"], GroupQuantizedSpec)]
