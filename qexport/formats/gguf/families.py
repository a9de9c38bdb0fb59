"""Where GGUF files have a model's parameters: the names of tensors, and the order of their rows.

The reference is llama.cpp's converter, `conversion/` in its repository.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig

RowOrder = Callable[[PretrainedConfig], Tensor]
"""From a configuration to int64 [rows]: which row of the model's tensor each row of the file is."""


def rotary_pairs(heads: int, rows: int) -> Tensor:
    """The order in which ggml's rotary embedding finds the two parts of a pair side by side, int64 [rows].

    transformers has the first parts of all pairs of a head in one half of its rows, and the second in the other.

    Args:
        heads: that the rows belong to.
        rows: heads * head_dim.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _queries(config: PretrainedConfig) -> Tensor:
    return rotary_pairs(config.num_attention_heads, config.num_attention_heads * head_dim(config))


def _keys(config: PretrainedConfig) -> Tensor:
    return rotary_pairs(config.num_key_value_heads, config.num_key_value_heads * head_dim(config))


def _falcon_qkv(config: PretrainedConfig) -> Tensor:
    """All queries, all keys, all values; in the model each head of keys and values follows its queries."""
    heads, keys, size = config.num_attention_heads, falcon_key_heads(config), head_dim(config)
    rows = torch.arange((heads + 2 * keys) * size).view(keys, heads // keys + 2, size)
    return torch.cat([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


def _neox_qkv(config: PretrainedConfig) -> Tensor:
    """All queries, all keys, all values; in the model each head has its three parts one behind the other."""
    heads = config.num_attention_heads
    return torch.arange(3 * config.hidden_size).view(heads, 3, -1).transpose(0, 1).reshape(-1)


def falcon_key_heads(config: PretrainedConfig) -> int:
    """The heads of keys and values, which Falcon's configuration names only in its new architecture."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def head_dim(config: PretrainedConfig) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary(config: PretrainedConfig) -> Mapping[str, Any]:
    """The parameters of the rotary embedding; of layers that see the whole text where others have their own."""
    found = getattr(config, "rope_parameters", None) or {}
    whole: Mapping[str, Any] = found.get("full_attention", found)
    return whole


def sliding_rotary(config: PretrainedConfig) -> Mapping[str, Any]:
    """Those of layers with a sliding window; empty where all layers have the same."""
    found: Mapping[str, Any] = (config.rope_parameters or {}).get("sliding_attention", {})
    return found


def constants(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensors of a file that are no parameters of the model, by name.

    Llama 3 stretches the slow ones of its rotary embedding's frequencies, and the file has what each is divided by,
    float32 [head_dim / 2].
    """
    found = rotary(config)
    if found.get("rope_type") != "llama3":
        return {}
    size, context = head_dim(config), found["original_max_position_embeddings"]
    frequencies = 1.0 / (found["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    lengths = 2 * math.pi / frequencies
    low, high, factor = found["low_freq_factor"], found["high_freq_factor"], found["factor"]
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(lengths > context / low, torch.full_like(between, factor), between)
    return {"rope_freqs.weight": torch.where(lengths < context / high, torch.ones_like(between), slow)}


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp stores a family.

    Attributes:
        arch: the gguf package's name for the architecture; its name in files is `MODEL_ARCH_NAMES[arch]`.
        causal_lm: the class of transformers.
        orders: the order of rows, by the last part of a module's path.
        raised_norms: the file has 1 + the weights of norms, which the model adds when it computes.
        transposed: the last parts of the paths of modules whose matrices are [in, out] in the model's own files.
    """

    arch: gguf.MODEL_ARCH
    causal_lm: str
    orders: Mapping[str, RowOrder] = field(default_factory=dict)
    raised_norms: bool = False
    transposed: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The value of `general.architecture`."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


_PAIRS: Final[Mapping[str, RowOrder]] = {"q_proj": _queries, "k_proj": _keys}

FAMILIES: Final[Mapping[str, GgufFamily]] = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, "LlamaForCausalLM", _PAIRS),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, "MistralForCausalLM", _PAIRS),
    "mixtral": GgufFamily(gguf.MODEL_ARCH.LLAMA, "MixtralForCausalLM", _PAIRS),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2, "Qwen2ForCausalLM"),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3, "Qwen3ForCausalLM"),
    "qwen3_moe": GgufFamily(gguf.MODEL_ARCH.QWEN3MOE, "Qwen3MoeForCausalLM"),
    "falcon": GgufFamily(gguf.MODEL_ARCH.FALCON, "FalconForCausalLM", {"query_key_value": _falcon_qkv}),
    "gpt_neox": GgufFamily(gguf.MODEL_ARCH.GPTNEOX, "GPTNeoXForCausalLM", {"query_key_value": _neox_qkv}),
    "gemma2": GgufFamily(gguf.MODEL_ARCH.GEMMA2, "Gemma2ForCausalLM", raised_norms=True),
    "gemma3_text": GgufFamily(gguf.MODEL_ARCH.GEMMA3, "Gemma3ForCausalLM", raised_norms=True),
    "phi3": GgufFamily(gguf.MODEL_ARCH.PHI3, "Phi3ForCausalLM"),
    "gpt2": GgufFamily(gguf.MODEL_ARCH.GPT2, "GPT2LMHeadModel", transposed=frozenset({"c_attn", "c_fc", "c_proj"})),
}
"""By `model_type`. A family is here if llama.cpp's converter gives the same tensors, which `make test-llama` checks."""


@dataclass(frozen=True)
class Places:
    """Where a model's parameters are in a file.

    Attributes:
        names: the name in the file of each parameter that has one, by its own name.
        orders: int64 [rows], the row of the parameter that each row of the file is, for those in another order.
        raised: parameters that the file has plus 1, in float32, as the model computes with them.
        transposed: matrices that are [in, out] in the model, and [out, in] in the file, as codes always are.
        experts: the expert's number, for the matrices of a mixture: the file has those of all experts in one tensor
            [experts, out, in], which is the name of each.
    """

    names: Mapping[str, str]
    orders: Mapping[str, Tensor]
    raised: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    experts: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def stacks(self) -> Mapping[str, int]:
        """How many experts are in each tensor that has those of all, by its name in the file."""
        return Counter(self.names[name] for name in self.experts)

    def part(self, name: str) -> str:
        """A name for what a parameter is in the file: of a tensor, or of one expert's part of it."""
        stored = self.names[name]
        return f"{stored}[{self.experts[name]}]" if name in self.experts else stored

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an unquantized parameter in the file from that in the model, and the other way round."""
        return shape[::-1] if name in self.transposed else shape

    def turned(self, name: str, value: Tensor) -> Tensor:
        """An unquantized parameter with the file's shape from one with the model's, and the other way round."""
        return value.t().contiguous() if name in self.transposed else value

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A parameter, with the file's shape [rows, ...], in the file's order of rows."""
        ordered = value if name not in self.orders else value[self.orders[name]]
        return ordered.to(torch.float32) + 1 if name in self.raised else ordered

    def restored(self, name: str, value: Tensor) -> Tensor:
        """The file's tensor [rows, ...] in the model's order of rows."""
        lowered = value - 1 if name in self.raised else value
        return lowered if name not in self.orders else lowered[self.orders[name].argsort()]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Places) and self.names == other.names

    def __hash__(self) -> int:
        return hash(tuple(self.names.items()))


_EXPERT: Final = re.compile(r"\.experts\.(\d+)(?=\.)")


def places(family: GgufFamily, config: PretrainedConfig, parameters: Iterable[str]) -> Places:
    """Where the parameters of a model are.

    Args:
        family: the model's.
        config: the model's.
        parameters: their names; one that the architecture does not have gets no place.
    """
    table = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    names, orders, experts = dict[str, str](), dict[str, Tensor](), dict[str, int]()
    made = {suffix: order(config) for suffix, order in family.orders.items()}
    for parameter in parameters:
        module, _, leaf = parameter.rpartition(".")
        expert = _EXPERT.search(module)
        if (name := table.get_name(module if expert is None else _EXPERT.sub(".experts", module))) is not None:
            names[parameter] = f"{name}.{leaf}"
            if expert is not None:
                experts[parameter] = int(expert[1])
            if (order := made.get(module.rpartition(".")[2])) is not None:
                orders[parameter] = order
    raised = frozenset(name for name in names if family.raised_norms and name.endswith("norm.weight"))
    transposed = frozenset(name for name in names if _is_matrix_of(name, family.transposed))
    return Places(names, orders, raised, transposed, experts)


def _is_matrix_of(parameter: str, modules: frozenset[str]) -> bool:
    module, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in modules
