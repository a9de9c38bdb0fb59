"""The `quantization_config` of bitsandbytes' formats: the fields of transformers' `BitsAndBytesConfig.to_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.format import Specs, quantized_modules
from qexport.formats.stored_weight import WHERE, SkipList, strings

QUANT_METHOD = "bitsandbytes"


def bitsandbytes_config(bits: int, specs: Specs, structure: Structure, **fields: Any) -> dict[str, Any]:
    """The `quantization_config` of an artifact.

    Args:
        bits: 4 or 8.
        specs: every parameter that the pass yields.
        structure: the model's.
        fields: those that the format sets; all others have transformers' defaults.
    """
    four_bit = bits == 4
    return {
        "quant_method": QUANT_METHOD,
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skip_modules(specs, structure),
        "llm_int8_threshold": 6.0,
    } | fields


def _skip_modules(specs: Specs, structure: Structure) -> list[str] | None:
    """The modules that transformers must not replace, by their whole path; None if its default is the same.

    By default transformers skips the head and what is tied to it. A list replaces that default, so it must name the
    head. Each entry is matched as a regular expression from the start of a path up to a dot or its end, and as the end
    of a path: whole paths match only themselves.
    """
    quantized = quantized_modules(specs)
    matrices = [
        name.removesuffix(".weight")
        for name, shape in structure.parameters.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    ends = (structure.embedding, structure.head)
    unquantized = [name for name in matrices if name not in quantized and name not in ends]
    return [structure.head, *unquantized] if unquantized else None


def loaded_bits(config: Mapping[str, Any] | None) -> int | None:
    """4 or 8; None for another `quant_method`.

    Raises:
        InputError: the config names both formats, or neither.
    """
    if config is None or config.get("quant_method") != QUANT_METHOD:
        return None
    four, eight = config.get("load_in_4bit", False), config.get("load_in_8bit", False)
    if type(four) is not bool or type(eight) is not bool or four == eight:
        raise InputError("exactly one of load_in_4bit and load_in_8bit must be true", where=WHERE)
    return 4 if four else 8


class BitsandbytesReader:
    """What the readers of both formats share: every linear is quantized, except those in `llm_int8_skip_modules`, or
    without that list the head. The experts of a mixture are never quantized: transformers quantizes modules, and
    experts are parameters.

    Args:
        config: the `quantization_config`.

    Raises:
        InputError: the list is malformed, or a pattern is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        listed = config.get("llm_int8_skip_modules")
        where = f"{WHERE}: llm_int8_skip_modules"
        self._skip = None if listed is None else SkipList(strings(listed, where), where)

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that are quantized according to the config, by path."""
        linears = {linear.name for linear in structure.block_linears if not linear.expert}
        if self._skip is None:
            return linears
        heads = set() if structure.tied else {structure.head}
        return {module for module in linears | heads if not self._skip.matches(module)}
