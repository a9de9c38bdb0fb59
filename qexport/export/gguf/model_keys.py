"""What a GGUF file's header says of the model, and the models that llama.cpp computes in another way.

The reference is llama.cpp as of llama-cpp-python 0.3.36: `conversion/` has the keys, `src/models/` what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from transformers import PretrainedConfig

from qexport.architectures.architecture import Architecture
from qexport.errors import CompatibilityError, listed
from qexport.export.gguf.gemma_keys import GEMMA, VALUES, gemma_keys, gemma_problems
from qexport.formats.gguf.families import FAMILIES, GgufFamily, falcon_key_heads, head_dim, rotary
from qexport.formats.gguf.header import Value

_MEND: Final = "leave this layout out; safetensors and onnx support the model"


def family_of(architecture: Architecture) -> GgufFamily:
    """The model's family.

    Raises:
        CompatibilityError: the family was not tried with llama.cpp, or llama.cpp does not compute such a model.
    """
    config = architecture.parsed
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CompatibilityError(
            f"the layout gguf does not know the family {config.model_type}",
            where="export: gguf",
            mend=f"it knows {', '.join(FAMILIES)}; {_MEND}",
        )
    if problems := [*_PROBLEMS.get(config.model_type, _llama_problems)(config), *_rotary_problems(config)]:
        raise CompatibilityError(
            f"llama.cpp does not compute such a model of the family {config.model_type}",
            where=f"config.json: {listed(problems)}",
            mend=_MEND,
        )
    return family


def model_keys(architecture: Architecture) -> dict[str, Value]:
    """The values that describe the model, by key, in the order of the file.

    Args:
        architecture: one that `family_of` accepts.
    """
    config, family = architecture.parsed, FAMILIES[architecture.parsed.model_type]
    values = _KEYS.get(config.model_type, _llama_keys)(config)
    common = {
        "block_count": int(config.num_hidden_layers),
        "context_length": context_length(config),
        "embedding_length": int(config.hidden_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        **_rotary_keys(config),
        "vocab_size": architecture.structure.vocab_size,
    }
    found = common | values
    return {f"{family.name}.{key}": value for key, value in (found | _scaling_keys(config)).items()}


def _rotary_keys(config: PretrainedConfig) -> dict[str, Value]:
    if config.model_type in _LEARNED:
        return {}
    return {
        "rope.dimension_count": int(head_dim(config) * rotary(config).get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rotary(config)["rope_theta"]),
    }


def context_length(config: PretrainedConfig) -> int:
    """The longest text that llama.cpp computes as the model does: it has sliding windows for Gemma alone."""
    context, window = int(config.max_position_embeddings), sliding_window(config)
    if config.model_type in GEMMA:
        return context
    return context if window is None else min(context, window)


def sliding_window(config: PretrainedConfig) -> int | None:
    """How many tokens a layer of the model sees at most; None if it sees all."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    return None if window is None else int(window)


def notes(config: PretrainedConfig) -> list[str]:
    """What users of the file should know of the model."""
    found = []
    if context_length(config) < config.max_position_embeddings:
        found.append(
            f"llama.cpp has no sliding window for this family: up to {context_length(config)} tokens, which are the "
            f"file's context_length, it computes the model; keep --ctx-size at that"
        )
    if config.model_type in ("falcon", "gpt2", "gpt_neox", *GEMMA):
        found.append("llama.cpp approximates the model's GELU")
    return found


def _scaling_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Llama 3's scaling is a tensor; see `qexport.formats.gguf.families.constants`."""
    if rotary(config).get("rope_type") != "linear":
        return {}
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary(config)["factor"])}


def _llama_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _falcon_keys(config: PretrainedConfig) -> dict[str, Value]:
    """The layout of the fused matrix is named after the person who described it first."""
    return {
        "tensor_data_layout": "jploski",
        "feed_forward_length": int(config.ffn_hidden_size),
        "attention.head_count_kv": falcon_key_heads(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _neox_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {
        "feed_forward_length": int(config.intermediate_size),
        "use_parallel_residual": bool(config.use_parallel_residual),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
    }


def _gpt2_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {
        "feed_forward_length": int(config.n_inner or 4 * config.hidden_size),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _phi3_keys(config: PretrainedConfig) -> dict[str, Value]:
    """llama.cpp takes no notice of the window, which is 0 for none."""
    return {
        **_llama_keys(config),
        "rope.scaling.original_context_length": int(config.original_max_position_embeddings),
        "attention.sliding_window": int(config.sliding_window or 0),
    }


def _mixtral_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {
        **_llama_keys(config),
        "expert_count": int(config.num_local_experts),
        "expert_used_count": int(config.num_experts_per_tok),
    }


def _qwen3_moe_keys(config: PretrainedConfig) -> dict[str, Value]:
    return {**_mixtral_keys(config), "expert_feed_forward_length": int(config.moe_intermediate_size)}


_KEYS: Final[Mapping[str, Callable[[PretrainedConfig], dict[str, Value]]]] = {
    "falcon": _falcon_keys,
    "gpt2": _gpt2_keys,
    "gpt_neox": _neox_keys,
    "mixtral": _mixtral_keys,
    "qwen3_moe": _qwen3_moe_keys,
    "phi3": _phi3_keys,
    **dict.fromkeys(GEMMA, gemma_keys),
}

_LLAMA_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ("silu", "swish")}
_QWEN2_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {"use_sliding_window": (False,)}
_QWEN3_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {"use_sliding_window": (False,), "attention_bias": (False,)}
_QWEN3_MOE_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    **_QWEN3_VALUES,
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
_FALCON_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "alibi": (False,),
    "bias": (False,),
    "parallel_attn": (True,),
    "activation": ("gelu",),
}
_ROPE_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "llama": ("default", "linear", "llama3"),
    "gemma3_text": ("default", "linear"),
}
_GPT2_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_LEARNED: Final = ("gpt2",)
"""Families with learned positions in place of a rotary embedding."""

_PARTIAL: Final = ("gpt_neox",)
"""Families of which llama.cpp may rotate a part of each head."""

_ONE_WIDTH: Final = ("qwen2", "phi3")
"""Families whose heads have together the width of the model."""

_OWN_VALUES: Final = {"qwen2": _QWEN2_VALUES, "qwen3": _QWEN3_VALUES, "qwen3_moe": _QWEN3_MOE_VALUES}


def _llama_problems(config: PretrainedConfig) -> Iterator[str]:
    if (window := sliding_window(config)) is not None and window < 1:
        yield f"sliding_window is {window}"
    yield from _unlike(config, {**_LLAMA_VALUES, **_OWN_VALUES.get(config.model_type, {})})
    if config.model_type in _ONE_WIDTH and head_dim(config) * config.num_attention_heads != config.hidden_size:
        yield f"head_dim is {head_dim(config)}, and must be hidden_size / num_attention_heads"


def _falcon_problems(config: PretrainedConfig) -> Iterator[str]:
    """In the new architecture the blocks are parallel whatever `parallel_attn` says."""
    wanted = dict(_FALCON_VALUES)
    if config.new_decoder_architecture:
        wanted.pop("parallel_attn")
    yield from _unlike(config, wanted)
    if not config.new_decoder_architecture and not config.multi_query:
        yield "multi_query is False, and so the keys of each head are beside its queries"


def _neox_problems(config: PretrainedConfig) -> Iterator[str]:
    yield from _unlike(config, {"hidden_act": ("gelu", "gelu_fast", "gelu_new"), "attention_bias": (True,)})


def _gpt2_problems(config: PretrainedConfig) -> Iterator[str]:
    yield from _unlike(config, _GPT2_VALUES)


def _gemma_problems(config: PretrainedConfig) -> Iterator[str]:
    yield from _unlike(config, VALUES)
    yield from gemma_problems(config)


_PROBLEMS: Final[Mapping[str, Callable[[PretrainedConfig], Iterator[str]]]] = {
    "falcon": _falcon_problems,
    "gpt2": _gpt2_problems,
    "gpt_neox": _neox_problems,
    **dict.fromkeys(GEMMA, _gemma_problems),
}


def _rotary_problems(config: PretrainedConfig) -> Iterator[str]:
    if config.model_type in _LEARNED:
        return
    found, known = rotary(config), _ROPE_TYPES.get(config.model_type, ("default",))
    if (kind := found.get("rope_type", "default")) not in known:
        yield f"rope_type is {kind!r}, and only {' and '.join(known)} were tried"
    if found.get("partial_rotary_factor", 1.0) != 1.0 and config.model_type not in _PARTIAL:
        yield "partial_rotary_factor is not 1"
    if "rope_theta" not in found:
        yield "rope_theta is missing"


def _unlike(config: PretrainedConfig, wanted: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for key, values in wanted.items():
        if (found := getattr(config, key, values[0])) not in values:
            yield f"{key} is {found!r}, and llama.cpp computes {values[0]!r}"
