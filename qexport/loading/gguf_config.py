"""The configuration of the model in a GGUF file, from its metadata and its tensors.

llama.cpp knows more of a family than its files say; where that is so, the reference is `src/models/` of llama.cpp as of
llama-cpp-python 0.3.36. What a config of transformers cannot express is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import gguf
import torch
from transformers import AutoConfig, PretrainedConfig

from qexport.architectures.config_bounds import refuse_extreme
from qexport.errors import CompatibilityError, InputError
from qexport.formats.gguf.families import FAMILIES, GgufFamily, constants, head_dim
from qexport.tensors.gguf_file import GgufFile

_REQUIRED: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL: Final = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_POSITIVE: Final = ("context_length", "rope.freq_base", "rope.freq_base_swa")
FREQUENCIES: Final = "rope_freqs.weight"
"""A tensor that is no parameter: what each frequency of the rotary embedding is divided by."""

_TOKENS: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_HEAD_WIDTHS: Final = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_MEND: Final = "name the safetensors model that the file was made from"
_REFETCH: Final = "fetch the file again"


def _nothing(_: _Metadata) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class _Reading:
    """How the config of an architecture is read.

    Attributes:
        family: how its tensors are stored.
        model_type: of transformers.
        names: keys of the config by metadata key, beyond or in place of those that every family has.
        further: what the metadata of a file do not say in a key of their own.
        epsilon: the key of what norms add to a variance.
    """

    family: GgufFamily
    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    further: Callable[[_Metadata], dict[str, Any]] = _nothing
    epsilon: str = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class _Metadata:
    """The values of an architecture, by key without its name, and the file that has them."""

    file: GgufFile
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        return self.file.metadata.get(f"{self.architecture}.{key}", default)


def read_config(file: GgufFile) -> tuple[GgufFamily, PretrainedConfig]:
    """The model's family, and its configuration as transformers' class for it.

    Raises:
        InputError: the metadata are malformed, or lack what llama.cpp requires.
        CompatibilityError: the architecture is not supported, or does what no config of transformers says.
    """
    metadata, reading = _reading(file)
    _refuse_unsupported(metadata)
    _refuse_impossible(metadata, reading.epsilon)
    values = _values(metadata, reading)
    refuse_extreme(values, where=str(file.path))  # before anything is computed from them
    values |= reading.further(metadata)
    refuse_extreme(values, where=str(file.path))
    try:
        config = AutoConfig.for_model(reading.model_type, **values)
    except Exception as error:  # the values are untrusted, and each family's checks raise errors of their own
        raise InputError(
            f"transformers cannot build a model from the metadata: {error}", where=str(file.path)
        ) from error
    assert isinstance(config, PretrainedConfig)
    _refuse_other_heads(metadata, config)
    _refuse_other_frequencies(file, config)
    return reading.family, config


def _reading(file: GgufFile) -> tuple[_Metadata, _Reading]:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InputError("the file does not say its architecture", where=str(file.path), mend=_REFETCH)
    if name not in _READINGS:
        raise CompatibilityError(
            f"GGUF files of architecture {name!r} are not supported",
            where=str(file.path),
            mend=f"supported: {', '.join(_READINGS)}; or {_MEND}",
        )
    return _Metadata(file, name), _READINGS[name]


def _refuse_unsupported(metadata: _Metadata) -> None:
    file = metadata.file
    if (
        metadata.get("expert_count", 0)
        or metadata.get("rope.scaling.type", "none") not in ("none", "linear")
        or (_linear_factor(metadata) != 1 and metadata.architecture not in ("llama", "gemma3"))
        or {"rope_factors_long.weight", "rope_factors_short.weight"} & set(file.tensors)
    ):
        raise _unsupported(file)


def _refuse_impossible(metadata: _Metadata, epsilon: str) -> None:
    """Refuses numbers that no model computes with, which would only show as NaN in its outputs."""
    for key, least in {epsilon: "0 or more", **dict.fromkeys(_POSITIVE, "more than 0")}.items():
        value = metadata.get(key)
        if not isinstance(value, int | float):  # absent, or of a type that `refuse_extreme` or transformers names
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and key != epsilon):
            raise InputError(
                f"{metadata.architecture}.{key} is {value}, and it must be {least}",
                where=str(metadata.file.path),
                mend=_REFETCH,
            )


def _unsupported(file: GgufFile) -> CompatibilityError:
    return CompatibilityError(
        "mixtures of experts and most scaled rotary embeddings are not supported in GGUF",
        where=str(file.path),
        mend=_MEND,
    )


def _linear_factor(metadata: _Metadata) -> float:
    """By what positions are divided; in llama.cpp the scaling is linear where a file names a factor and no type."""
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0))
    if metadata.get("rope.scaling.type", "linear") != "linear" or factor == 0:
        return 1.0
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise InputError(
            f"the factor of the rotary embedding is {factor!r}", where=str(metadata.file.path), mend=_REFETCH
        )
    return float(factor)


def _values(metadata: _Metadata, reading: _Reading) -> dict[str, Any]:
    """What the config is made of, by its own keys."""
    file = metadata.file
    if absent := [key for key in (*_REQUIRED, reading.epsilon) if metadata.get(key) is None]:
        raise InputError(f"the metadata lack {', '.join(absent)}", where=str(file.path), mend=_REFETCH)
    names = _REQUIRED | _OPTIONAL | dict(reading.names)
    values: dict[str, Any] = {name: metadata.get(key) for key, name in names.items() if metadata.get(key) is not None}
    tokens = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in _TOKENS.items()}
    values |= {name: token for name, token in tokens.items() if token is not None}
    values.setdefault("vocab_size", file.array_lengths.get("tokenizer.ggml.tokens"))
    return values | {
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "architectures": [reading.family.causal_lm],
    }


def _llama(metadata: _Metadata) -> dict[str, Any]:
    """Llama 3 stretches some frequencies; the file has the divisors alone, see `_refuse_other_frequencies`."""
    scaling: dict[str, Any] | None = None
    linear = _linear_factor(metadata)
    if FREQUENCIES in metadata.file.tensors and (_divisors(metadata.file) != 1).any():
        if linear != 1:
            raise _unsupported(metadata.file)
        scaling = {
            "rope_type": "llama3",
            "factor": float(_divisors(metadata.file).max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif linear != 1:
        scaling = {"rope_type": "linear", "factor": linear}
    if scaling is None:
        return {}
    return {"rope_parameters": {"rope_theta": metadata.get("rope.freq_base", 10000.0), **scaling}}


def _falcon(metadata: _Metadata) -> dict[str, Any]:
    """A file says neither which of Falcon's three blocks it has, nor that a single head of keys is shared by all."""
    if metadata.get("attention.head_count_kv", 1) == 1:
        return {"multi_query": True, "new_decoder_architecture": False}
    norms = 2 if "blk.0.attn_norm_2.weight" in metadata.file.tensors else 1
    return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": norms}


def _divisors(file: GgufFile) -> torch.Tensor:
    tensor = file.tensors[FREQUENCIES]
    if tensor.kind != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise InputError(f"{FREQUENCIES} is no vector of float32", where=str(file.path), mend=_MEND)
    return torch.from_numpy(file.read_rows(FREQUENCIES, 0, 1).view("<f4").copy()).view(-1)


def _softcapping(metadata: _Metadata, key: str = "final_logit_softcapping", default: float = 0.0) -> float:
    """Beyond what the logits do not grow; 0 for no bound, as in llama.cpp."""
    value = metadata.get(key, default)
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(
            f"{metadata.architecture}.{key} is {value!r}, and it must be 0 or more",
            where=str(metadata.file.path),
            mend=_REFETCH,
        )
    return float(value)


def _phi3(metadata: _Metadata) -> dict[str, Any]:
    """A window of 0 stands for none."""
    window = metadata.get("attention.sliding_window", 0)
    return {"sliding_window": window} if window else {}


_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def _layer_types(metadata: _Metadata, pattern: int, window: int) -> dict[str, Any]:
    """Which layers see a window: all but every n-th one.

    Args:
        metadata: of the file, which may name another n, or each layer's kind.
        pattern: the n of the family.
        window: of a file that names none; 0 for none.
    """
    blocks = metadata.get("block_count")
    own = f"{metadata.architecture}.{_PATTERN}"
    size, every = metadata.get(_WINDOW, window), metadata.get(_PATTERN, pattern)
    if own in metadata.file.array_lengths:
        kinds = [bool(kind) for kind in metadata.file.array(own)]
    elif isinstance(every, int) and every >= 0:
        kinds = [not every or layer % every < every - 1 for layer in range(blocks)]
    else:
        kinds = []
    if len(kinds) != blocks:
        raise InputError(f"{own} is not what llama.cpp reads", where=str(metadata.file.path), mend=_REFETCH)
    sees = ["sliding_attention" if kind and size else "full_attention" for kind in kinds]
    return {"layer_types": sees} | ({"sliding_window": size} if size else {})


def _query_divisor(metadata: _Metadata, largest: int) -> dict[str, Any]:
    """llama.cpp knows the model of 27B, which divides its queries in another way, by its number of blocks."""
    width, heads = metadata.get("embedding_length"), metadata.get("attention.head_count")
    if metadata.get("block_count") == largest and heads:
        return {"query_pre_attn_scalar": width // heads}
    return {"query_pre_attn_scalar": metadata.get("attention.key_length", 256)}


def _gemma2(metadata: _Metadata) -> dict[str, Any]:
    """Where a file names no bounds of the logits, llama.cpp takes those of the public models."""
    return {
        "attn_logit_softcapping": _softcapping(metadata, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _softcapping(metadata, default=30.0),
        **_layer_types(metadata, 2, 4096),
        **_query_divisor(metadata, 46),
    }


def _gemma3(metadata: _Metadata) -> dict[str, Any]:
    """The layers with a window have a rotary embedding of their own."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 1e6)}
    if (factor := _linear_factor(metadata)) != 1:
        full |= {"rope_type": "linear", "factor": factor}
    sliding = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 1e4)}
    found: dict[str, Any] = {"rope_parameters": {"sliding_attention": sliding, "full_attention": full}}
    if cap := _softcapping(metadata):
        found["final_logit_softcapping"] = cap
    return found | _layer_types(metadata, 6, 0) | _query_divisor(metadata, 62)


_READINGS: Final[Mapping[str, _Reading]] = {
    "llama": _Reading(FAMILIES["llama"], "llama", {"rope.dimension_count": "head_dim"}, _llama),
    "qwen2": _Reading(FAMILIES["qwen2"], "qwen2"),
    "qwen3": _Reading(FAMILIES["qwen3"], "qwen3", {"attention.key_length": "head_dim"}),
    "falcon": _Reading(
        FAMILIES["falcon"],
        "falcon",
        {
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        _falcon,
        epsilon="attention.layer_norm_epsilon",
    ),
    "phi3": _Reading(FAMILIES["phi3"], "phi3", further=_phi3),
    "gemma2": _Reading(FAMILIES["gemma2"], "gemma2", {"attention.key_length": "head_dim"}, _gemma2),
    "gemma3": _Reading(FAMILIES["gemma3_text"], "gemma3_text", {"attention.key_length": "head_dim"}, _gemma3),
}
"""By `general.architecture`. The layout `gguf` also writes GPT-NeoX, whose heads are rotated in part, and GPT-2, whose
matrices are transposed."""


def _refuse_other_heads(metadata: _Metadata, config: PretrainedConfig) -> None:
    for key in _HEAD_WIDTHS:
        if metadata.get(key, head_dim(config)) != head_dim(config):
            raise CompatibilityError(
                f"{key} is {metadata.get(key)}, and the heads of such a model have {head_dim(config)} values",
                where=str(metadata.file.path),
                mend=_MEND,
            )


def _refuse_other_frequencies(file: GgufFile, config: PretrainedConfig) -> None:
    if FREQUENCIES not in file.tensors:
        return
    found, expected = _divisors(file), constants(config).get(FREQUENCIES, torch.ones(head_dim(config) // 2))
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=0):
        raise CompatibilityError(
            f"{FREQUENCIES} has other values than those of Llama 3", where=str(file.path), mend=_MEND
        )
