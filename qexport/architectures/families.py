"""The quirks of model families: layers that stay unquantized, experts, and keys of config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Family:
    """The quirks of one `model_type`.

    Attributes:
        keep_unquantized: patterns of module paths that no method quantizes unless the recipe forces it; with reasons.
        unmergeable: patterns of module paths that an adapter must not touch, with the reason.
        one_end: servers use the embedding as the head, whatever config.json says.
        folds: what makes the inputs of linear layers, and those layers, by their names in a block; each layer belongs
            to the first source that the block has. Only where nothing but multiplications lie between: no activation,
            and no norm whose weight is stored less one (Gemma).
    """

    keep_unquantized: Mapping[str, str] = field(default_factory=dict)
    unmergeable: Mapping[str, str] = field(default_factory=dict)
    one_end: bool = False
    folds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_MAMBA = "the fused mamba kernel takes this weight directly and would bypass the change"

_BETWEEN_LINEARS: Final = {"self_attn.v_proj": ("self_attn.o_proj",), "mlp.up_proj": ("mlp.down_proj",)}
_AFTER_NORMS: Final = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_FALCON: Final = {
    "ln_attn": ("self_attention.query_key_value",),
    "ln_mlp": ("mlp.dense_h_to_4h",),
    "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    "input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
}

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Family(folds=_AFTER_NORMS | _BETWEEN_LINEARS)),
    "falcon": Family(folds=_FALCON),
    "falcon_h1": Family(
        keep_unquantized={"*.mamba.out_proj": _MAMBA, "*.mamba.conv1d": _MAMBA},
        unmergeable={"*.mamba.out_proj": _MAMBA, "*.mamba.conv1d": _MAMBA},
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), Family(one_end=True, folds=_BETWEEN_LINEARS)),
}


def family(model_type: str) -> Family:
    """The quirks of `model_type`; most families have none."""
    return FAMILIES.get(model_type, Family())


def matching(patterns: Mapping[str, str], module: str) -> str | None:
    """The reason of the first pattern (fnmatch, case-sensitive) that `module` matches, or None."""
    return next((reason for pattern, reason in patterns.items() if fnmatchcase(module, pattern)), None)


CODE_KEYS: Final = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "trust_remote_code",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
    }
)
"""Keys by which transformers finds code outside itself: Python files in the model's folder, or kernels from a hub."""

_MACHINE_KEYS: Final = frozenset({"_name_or_path", "_commit_hash"})
"""Keys that record where the files were on the machine that saved them."""


def without_code_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without `CODE_KEYS` and machine paths at any depth, and the code keys that were dropped."""
    dropped: list[str] = []

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        dropped.extend(key for key in value if key in CODE_KEYS)
        return {key: clean(item) for key, item in value.items() if key not in CODE_KEYS | _MACHINE_KEYS}

    return clean(config), sorted(set(dropped))


def older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of older transformers versions, with their values; which of them a runtime needs depends on the family.

    Args:
        config: every value of a configuration, defaults included: `to_dict()` of a parsed one.
    """
    keys = _rotary(config.get("rope_parameters") or {})
    if config["model_type"] == "falcon":
        keys |= _falcon(config)
    if layers := config.get("layer_types"):
        keys["sliding_window_pattern"] = _pattern(list(layers), config)
    return keys


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Families with two kinds of layers have one set of parameters for each kind."""
    main = parameters.get("full_attention", parameters)
    if not isinstance(main, Mapping) or "rope_theta" not in main:
        return {}
    moved = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in main.items() if key not in moved}
    keys = {
        "rope_theta": main["rope_theta"],
        "rotary_emb_base": main["rope_theta"],
        "rotary_pct": main.get("partial_rotary_factor", 1.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if "partial_rotary_factor" in main:
        keys["partial_rotary_factor"] = main["partial_rotary_factor"]
    if isinstance(local := parameters.get("sliding_attention"), Mapping):
        keys["rope_local_base_freq"] = local["rope_theta"]
    return keys


def _falcon(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of key-value heads and of layer norms per layer, which transformers derives from other keys."""
    if config["new_decoder_architecture"]:
        norms = config.get("num_ln_in_parallel_attn")
        return {"num_kv_heads": config["num_kv_heads"], "num_ln_in_parallel_attn": 2 if norms is None else norms}
    return {"num_kv_heads": 1 if config["multi_query"] else config["num_attention_heads"]}


def _pattern(layers: list[str], config: Mapping[str, Any]) -> int:
    """The n for which every n-th layer has full attention."""
    if "full_attention" in layers:
        return layers.index("full_attention") + 1
    return int(config.get("_sliding_window_pattern", len(layers) + 1))


class ExpertStop(nn.Module):
    """The point of a forward just before tokens are multiplied by the matrices of some experts.

    It is called with the tokens' states [tokens, in], ordered by expert, and the number of tokens of each expert.

    Args:
        parameter: `gate_up_proj` or `down_proj`.
        experts: the experts whose matrices are multiplied next.
    """

    def __init__(self, parameter: str, experts: range) -> None:
        super().__init__()
        self.parameter, self.experts = parameter, experts

    def forward(self, states: Tensor, counts: Sequence[int]) -> None:
        """Does nothing."""


def can_stage(module: nn.Module) -> bool:
    """Whether a module computes its experts as `staged` does: transformers' plain gated experts, without biases."""
    plain = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    return all(getattr(module, name, None) is value for name, value in plain.items()) and {
        name for name, _ in module.named_parameters()
    } == {"gate_up_proj", "down_proj"}


@contextmanager
def staged(module: nn.Module, square_bytes: int) -> Iterator[list[ExpertStop]]:
    """Gives a module of experts a forward in two stages: all experts' inputs, then all experts' hidden states.

    The result is that of transformers' eager experts, bit for bit: the same products of the same tokens in the same
    order.

    Args:
        module: one for which `can_stage` is true.
        square_bytes: the most bytes for the square matrices [in, in] of the experts of one stop; a stop has at least
            one expert.
    """
    stops = [
        ExpertStop(name, experts)
        for name in ("gate_up_proj", "down_proj")
        for experts in _portions(module.get_parameter(name), square_bytes)
    ]
    module.forward = _forward(module, stops)
    try:
        yield stops
    finally:
        del module.forward


def staged_forward(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same forward, with a change of the tokens' states before each product.

    Args:
        module: one for which `can_stage` is true.
        change: from states [tokens, in] to states of the same shape and dtype.
    """
    everyone = range(len(module.get_parameter("down_proj")))
    return _forward(module, [ExpertStop(name, everyone) for name in ("gate_up_proj", "down_proj")], change)


def _portions(parameter: Tensor, square_bytes: int) -> list[range]:
    count, _, inputs = parameter.shape
    step = max(1, square_bytes // (inputs * inputs * torch.float32.itemsize))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _forward(
    module: Any, stops: Sequence[ExpertStop], change: Callable[[Tensor], Tensor] = lambda states: states
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def products(name: str, states: Tensor, counts: Sequence[int]) -> Tensor:
        states = change(states)
        parts = states.split(list(counts))
        outputs = []
        for stop in (stop for stop in stops if stop.parameter == name):
            stop(states, counts)
            weights = module.get_parameter(name)
            outputs += [functional.linear(parts[expert], weights[expert]) for expert in stop.experts]
        return torch.cat(outputs)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.t().reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(module.get_parameter("down_proj"))).tolist()
        tokens = order % len(hidden_states)
        gated = module._apply_gate(products("gate_up_proj", hidden_states[tokens], counts))
        outputs = products("down_proj", gated, counts)
        outputs = outputs * top_k_weights.t().reshape(-1)[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, tokens, outputs.to(hidden_states.dtype))

    return forward
