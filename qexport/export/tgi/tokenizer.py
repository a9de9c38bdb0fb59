"""The tokenizer's files as transformers 4.51, tokenizers 0.21 and TGI's router read them.

Sources: `router/src/lib.rs` (`HubTokenizerConfig`) and `router/src/server.rs`, which look for the chat template in
tokenizer_config.json only; transformers 4.51.3, `tokenization_utils_base.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from qexport.errors import CompatibilityError, InputError
from qexport.tensors.strict_files import parse_json
from qexport.text.tokenizer_identity import CHAT_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

TOKENIZER: Final = "tokenizer.json"

NEW_CLASSES: Final = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
"""Classes that transformers 5 writes and 4.51 does not know."""

_NEW_KEYS: Final = ("backend", "is_local")


def tgi_tokenizer_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that travel with a checkpoint, with a tokenizer_config.json that TGI understands.

    Args:
        files: by name, as the base has them.

    Raises:
        CompatibilityError: there is no tokenizer.json, without which the router cannot count tokens.
        InputError: a file is malformed.
    """
    if TOKENIZER not in files:
        raise CompatibilityError(
            "TGI needs the fast tokenizer, tokenizer.json, which the base does not have",
            where=TOKENIZER,
            mend="AutoTokenizer.from_pretrained(BASE).save_pretrained(BASE) writes it",
        )
    config = _read(files)
    if config.get("tokenizer_class") in NEW_CLASSES:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if not config.get("chat_template") and (template := _chat_template(files)):
        config["chat_template"] = template
    kept = {key: value for key, value in config.items() if key not in _NEW_KEYS}
    return {**files, TOKENIZER_CONFIG: (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode("utf-8")}


def _read(files: Mapping[str, bytes]) -> dict[str, Any]:
    if TOKENIZER_CONFIG not in files:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = parse_json(files[TOKENIZER_CONFIG], where=TOKENIZER_CONFIG)
    if not isinstance(config, dict):
        raise InputError("must hold a JSON object", where=TOKENIZER_CONFIG)
    return config


def _chat_template(files: Mapping[str, bytes]) -> str | list[dict[str, str]] | None:
    """One template, or all by name where there are others beside the default."""
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
