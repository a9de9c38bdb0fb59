"""config.json and the tokenizer's files, converted to the keys that transformers 4.51 and TGI read.

Sources: `router/src/lib.rs` (`HubTokenizerConfig`) and `router/src/server.rs`, which look for the chat template in
tokenizer_config.json only; transformers 4.51.3, `tokenization_utils_base.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from transformers import PreTrainedConfig

from qexport.architectures.families import older_keys
from qexport.architectures.structure import parse_config
from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json
from qexport.text.tokenizer_identity import CHAT_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

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
