"""GPTQ's second config: quantize_config.json, which some loaders read in place of config.json's quantization_config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

CONFIG_FILE: Final = "quantize_config.json"

_MEANS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "bits": None,
        "group_size": None,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": None,
        "modules_in_block_to_quantize": None,
        "modules_to_not_convert": None,
    }
)
"""The keys by which codes are read, with what AutoGPTQ, gptqmodel 7 and TGI 3.3 take where one is absent."""

_OF_THE_MAKER: Final = frozenset({"meta", "model_name_or_path", "model_file_base_name"})
"""What the program that quantized notes about itself."""


def second_config_differences(config: Mapping[str, Any] | None, second: Mapping[str, Any]) -> list[str]:
    """Each key in which the two contradict each other, with both values.

    A key that only one of them has is a difference if codes are read by it and its value is not the default; settings
    of the solver, such as `damp_percent`, may be in one of them alone.

    Args:
        config: the `quantization_config` in config.json; None if there is none.
        second: the content of quantize_config.json.
    """
    if config is None:
        return ["config.json has no quantization_config, so some loaders read GPTQ codes and others none"]
    problems = []
    for key in sorted((config.keys() | second.keys()) - _OF_THE_MAKER):
        own, other = (_meaning(key, each) for each in (config, second))
        if own != other and (key in _MEANS or (key in config and key in second)):
            problems.append(f"{key} is {second.get(key)!r:.80}, in config.json {config.get(key)!r:.80}")
    return problems


def _meaning(key: str, config: Mapping[str, Any]) -> Any:
    value = config.get(key)
    return _MEANS.get(key) if value is None or value == {} else value
