"""Which of TGI's models serves a family, and its linear layers as TGI stores them: joined, and split between shards.

Sources: `models/__init__.py` (the choice), `models/custom_modeling/flash_*_modeling.py` (the linears). Families for
which TGI has no model are run by transformers 4.51, the version that TGI pins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, Final

from transformers import PreTrainedConfig

from qexport.architectures.families import older_keys
from qexport.architectures.structure import parse_config
from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json
from qexport.text.file_names import CHAT_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

_GENERAL: Final = frozenset(PreTrainedConfig().to_dict()) | {"rope_parameters", "layer_types"}
"""Keys that every configuration of transformers has, or that version 4.51 does not know."""

_ROTARY: Final = ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor")
_OWN: Final[Mapping[str, tuple[str, ...]]] = {
    "falcon": ("num_kv_heads", "num_ln_in_parallel_attn"),
    "gemma3_text": ("sliding_window_pattern",),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
}
_KEPT: Final = ("rope_local_base_freq", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
"""Older keys whose values in the base are kept. The others are always set, since TGI reads them without a check."""

FALCON_KEYS: Final = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "layer_norm_epsilon",
    "new_decoder_architecture", "multi_query", "parallel_attn", "bias", "alibi",
)  # fmt: skip
"""Keys that TGI's `RWConfig` (flash_rw_modeling.py) reads, with other defaults than transformers."""


def tgi_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from which transformers 4.51 and TGI make the same model as transformers 5 from `config`.

    Every value that has a default is written, since defaults differ between versions and classes.

    Args:
        config: the base's config.json.
    """
    full: dict[str, Any] = parse_config(config).to_dict()
    values = {
        key: value
        for key, value in full.items()
        if key not in _GENERAL and not key.startswith("_") and value is not None and _plain(value)
    }
    read = (*_ROTARY, *_OWN.get(full["model_type"], ()))
    older = {
        key: value
        for key, value in older_keys(full).items()
        if key in read and value is not None and (key not in _KEPT or config.get(key) is None)
    }
    return {**values, **config, "torch_dtype": "float16", "is_encoder_decoder": False, **older}


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values, from the result of `tgi_config`; 0 if there is no attention."""
    keys = ("num_kv_heads", "num_key_value_heads", "num_attention_heads", "n_head", "n_heads")
    return next((int(config[key]) for key in keys if config.get(key) is not None), 0)


def _plain(value: Any) -> bool:
    """Whether JSON can represent the value."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, str | int)


TOKENIZER: Final = "tokenizer.json"

NEW_CLASSES: Final = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
"""Tokenizer classes that transformers 5 writes and 4.51 does not know."""

_NEW_KEYS: Final = ("backend", "is_local")


def tgi_tokenizer_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files, with a tokenizer_config.json that TGI can read.

    Args:
        files: the base's files, by name.

    Raises:
        InputError: a file is malformed.
    """
    config = _read_tokenizer_config(files)
    if config.get("tokenizer_class") in NEW_CLASSES:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if not config.get("chat_template") and (template := _chat_template(files)):
        config["chat_template"] = template
    kept = {key: value for key, value in config.items() if key not in _NEW_KEYS}
    return {**files, TOKENIZER_CONFIG: (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode("utf-8")}


def _read_tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    if TOKENIZER_CONFIG not in files:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = parse_json(files[TOKENIZER_CONFIG], where=TOKENIZER_CONFIG)
    if not isinstance(config, dict):
        raise InputError("must hold a JSON object", where=TOKENIZER_CONFIG)
    return config


def _chat_template(files: Mapping[str, bytes]) -> str | list[dict[str, str]] | None:
    """The template, or a list of all named templates if there are others beside the default."""
    named = {
        PurePosixPath(name).stem: content for name, content in files.items() if name.startswith(f"{TEMPLATES_FOLDER}/")
    }
    if CHAT_TEMPLATE not in files:
        return None
    default = files[CHAT_TEMPLATE].decode("utf-8")
    if not named:
        return default
    others = [{"name": name, "template": content.decode("utf-8")} for name, content in sorted(named.items())]
    return [{"name": "default", "template": default}, *others]


class Backend(Enum):
    """Which implementation runs a model."""

    OWN = "TGI's own model"
    TRANSFORMERS = "the model of transformers with TGI's attention"
    SLOW = "the model of transformers with its own attention: slow, on one GPU"


@dataclass(frozen=True)
class OwnModel:
    """One of TGI's own models. Modules are named by the last part of their path.

    Attributes:
        joined: groups of modules that become one linear.
        row: modules that are split along their inputs between shards; all others are split along their outputs.
        packed: modules that contain several linears, each of which is split.
        prequantized: why TGI cannot compute this family from quantized tensors; None if it can.
    """

    joined: tuple[tuple[str, ...], ...] = ()
    row: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    prequantized: str | None = None


_QKV: Final = ("q_proj", "k_proj", "v_proj")
_GATED: Final = OwnModel(joined=(_QKV, ("gate_proj", "up_proj")), row=("o_proj", "down_proj"))
_EXPERTS: Final = "the experts have their own kernels and names"
_MIXTURE: Final = OwnModel(joined=(_QKV,), row=("o_proj",), prequantized=_EXPERTS)
_UNTRIED: Final = (
    "dbrx", "deepseek_v2", "deepseek_v3", "gpt2", "gptj", "gpt_bigcode", "opt", "bloom", "mpt", "mamba", "baichuan",
)  # fmt: skip
_OTHER: Final = OwnModel(prequantized="how TGI joins and splits its quantized linears is not known to qexport")

OWN_MODELS: Final[Mapping[str, OwnModel]] = {
    **dict.fromkeys(("llama", "mistral", "granite", "gemma", "gemma2", "gemma3_text", "qwen2", "cohere"), _GATED),
    "starcoder2": OwnModel(joined=(_QKV,), row=("o_proj", "c_proj")),
    "phi": OwnModel(joined=(_QKV,), row=("dense", "fc2")),
    "phi3": OwnModel(row=("o_proj", "down_proj"), packed=("qkv_proj", "gate_up_proj")),
    "falcon": OwnModel(row=("dense", "dense_4h_to_h")),
    "gpt_neox": OwnModel(
        row=("dense", "dense_4h_to_h"),
        prequantized="the rows of query_key_value are brought into TGI's order for 16-bit weights only (flash_neox_"
        "modeling.py), so quantized ones would be multiplied in the wrong order without an error",
    ),
    **dict.fromkeys(("mixtral", "phimoe"), _MIXTURE),
    **dict.fromkeys(_UNTRIED, _OTHER),
}

_TRANSFORMERS: Final = frozenset({"cohere2", "glm", "glm4", "helium", "olmo", "olmo2", "qwen3", "qwen3_moe"})

_SLOW: Final = frozenset(
    {
        "bamba", "biogpt", "codegen", "ctrl", "diffllama", "falcon_mamba", "gpt_neo", "gpt_neox_japanese",
        "granitemoe", "granitemoeshared", "jamba", "jetmoe", "mamba2", "nemotron", "olmoe", "openai-gpt", "persimmon",
        "qwen2_moe", "recurrent_gemma", "rwkv", "stablelm", "xglm", "zamba", "zamba2",
    }
)  # fmt: skip


def backend(config: Mapping[str, Any]) -> Backend | None:
    """Which implementation TGI 3.3 would use; None if it does not support the family.

    Args:
        config: the model's config.json.
    """
    model_type = config.get("model_type")
    if model_type == "falcon" and config.get("alibi"):
        return Backend.SLOW
    if model_type in OWN_MODELS:
        return Backend.OWN
    if model_type in _TRANSFORMERS:
        return Backend.TRANSFORMERS
    return Backend.SLOW if model_type in _SLOW else None


Shape = tuple[int, int]
"""Outputs and inputs."""


@dataclass(frozen=True)
class ServedLinear:
    """One linear layer in the server.

    Attributes:
        modules: the paths of the modules that it consists of, in the order of TGI's model.
        shapes: outputs and inputs of each module.
        row: whether it is split along the inputs between shards, else along the outputs.
        packed: whether it is one module that contains several linears.
    """

    modules: tuple[str, ...]
    shapes: tuple[Shape, ...]
    row: bool
    packed: bool

    @property
    def name(self) -> str:
        """All module paths, shortened."""
        first, *rest = self.modules
        return "+".join([first, *(module.rpartition(".")[2] for module in rest)])

    @property
    def shape(self) -> Shape:
        """Outputs and inputs of the whole layer."""
        return sum(out for out, _ in self.shapes), self.shapes[0][1]

    def sharded(self, degree: int) -> Shape | None:
        """Outputs and inputs on one of `degree` shards; None if they cannot be divided."""
        divided = [in_features if self.row else out_features for out_features, in_features in self.shapes]
        if any(count % degree for count in divided):
            return None
        out_features, in_features = self.shape
        return (out_features, in_features // degree) if self.row else (out_features // degree, in_features)


def served_linears(shapes: Mapping[str, Shape], model: OwnModel) -> list[ServedLinear]:
    """The linears of a model as TGI joins them.

    Args:
        shapes: outputs and inputs of each linear, by module path.
        model: TGI's model for the family.
    """
    joined = {name: group for group in model.joined for name in group}
    keys = {module: (module.rpartition(".")[0], joined.get(_last(module), (_last(module),))) for module in shapes}
    ordered = sorted(shapes, key=lambda module: keys[module])
    return [_served(tuple(modules), shapes, model) for _, modules in groupby(ordered, key=lambda module: keys[module])]


def _served(modules: Iterable[str], shapes: Mapping[str, Shape], model: OwnModel) -> ServedLinear:
    order = {name: index for group in model.joined for index, name in enumerate(group)}
    modules = tuple(sorted(modules, key=lambda module: order.get(_last(module), 0)))
    last = _last(modules[0])
    return ServedLinear(modules, tuple(shapes[module] for module in modules), last in model.row, last in model.packed)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
