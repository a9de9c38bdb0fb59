"""What a GGUF file's header says of Gemma 2 and 3, and which of them llama.cpp computes in another way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from transformers import PretrainedConfig

from qexport.formats.gguf.families import head_dim, sliding_rotary
from qexport.formats.gguf.header import Value

GEMMA: Final = ("gemma2", "gemma3_text")
"""The `model_type`s."""

_SLIDING: Final = "sliding_attention"
_PATTERNS: Final[Mapping[str, int]] = {"gemma2": 2, "gemma3_text": 6}
_BLOCKS_OF_27B: Final = {"gemma2": 46, "gemma3_text": 62}
"""llama.cpp knows the largest model, which divides its queries by another number, by its number of blocks."""

VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}
"""The values of a configuration that llama.cpp computes, for both."""


def gemma_keys(config: PretrainedConfig) -> dict[str, Value]:
    """The values of one family, by key without the architecture's name.

    Args:
        config: one without `gemma_problems`.
    """
    capped: dict[str, Value] = {
        key: float(cap)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        if (cap := getattr(config, key))
    }
    return {
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **capped,
        **_window_keys(config),
    }


def _window_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Which layers see a window is said only where llama.cpp would take others; the default is the public models'."""
    if _SLIDING not in config.layer_types:
        return {}
    found: dict[str, Value] = {"attention.sliding_window": int(config.sliding_window)}
    if theta := sliding_rotary(config).get("rope_theta"):
        found["rope.freq_base_swa"] = float(theta)
    pattern = _pattern(config)
    if pattern not in (None, _PATTERNS[config.model_type]):
        found["attention.sliding_window_pattern"] = pattern
    return found


def _pattern(config: PretrainedConfig) -> int | None:
    """The n for which every n-th layer sees the whole text and all others a window, the family's own if it fits; None
    if there is none.
    """
    kinds, own = config.layer_types, _PATTERNS[str(config.model_type)]
    patterns: list[int] = [own, *range(2, len(kinds) + 2)]
    for pattern in patterns:
        if all((kind == _SLIDING) is (layer % pattern < pattern - 1) for layer, kind in enumerate(kinds)):
            return pattern
    return None


def gemma_problems(config: PretrainedConfig) -> Iterator[str]:
    """What llama.cpp would compute in another way, beyond `VALUES`."""
    is_27b = config.num_hidden_layers == _BLOCKS_OF_27B[config.model_type]
    divisor = config.hidden_size // config.num_attention_heads if is_27b else head_dim(config)
    if config.query_pre_attn_scalar != divisor:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {divisor}"
    yield from _window_problems(config)
    if config.model_type == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not getattr(config, key):
                yield f"{key} is {getattr(config, key)!r}, and llama.cpp always caps"
    elif config.attn_logit_softcapping is not None:
        yield f"attn_logit_softcapping is {config.attn_logit_softcapping!r}, and llama.cpp does not cap"
    sliding = sliding_rotary(config)
    if sliding.get("rope_type", "default") != "default" or sliding.get("partial_rotary_factor", 1.0) != 1.0:
        yield "the rotary embedding of layers with a sliding window is scaled or partial"


def _window_problems(config: PretrainedConfig) -> Iterator[str]:
    if _SLIDING not in config.layer_types:
        if config.model_type == "gemma2":
            yield "no layer has a sliding window"
        return
    if config.sliding_window < 1:
        yield f"sliding_window is {config.sliding_window}"
    if _pattern(config) is None:
        yield "layer_types: not every n-th layer sees the whole text"
