"""The identity of tokenizers and chat templates: their file names and digests, and the files that hold templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from qexport.artifact.digests import sha256_bytes, sha256_json
from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
TEMPLATES_FOLDER: Final = "additional_chat_templates"
OLD_TEMPLATE: Final = "chat_template.json"


_TEMPLATE_KEY: Final = "chat_template"

_VOCABULARY_FILES: Final = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """The hex digest of a tokenizer: of its vocabulary files, and of tokenizer_config.json without the chat template.

    Layouts may rewrite tokenizer_config.json for a server. To compare figures across layouts, pass the reference's
    files.

    Args:
        files: a model's, by name inside its folder; those that are not the tokenizer's are ignored.

    Raises:
        InputError: there is no tokenizer in them, or tokenizer_config.json is malformed.
    """
    digests = {name: sha256_bytes(files[name]) for name in _VOCABULARY_FILES if name in files}
    if not digests:
        raise InputError("the model has no tokenizer", where="its files")
    config = json_object(files, TOKENIZER_CONFIG)
    kept = {key: value for key, value in config.items() if key != _TEMPLATE_KEY}
    digests[TOKENIZER_CONFIG] = sha256_bytes(json.dumps(kept, sort_keys=True).encode())  # it may hold Infinity
    return sha256_json(digests)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The hex digest of the chat template: sha256 of its UTF-8 bytes; None if the tokenizer has none.

    If it has several, the digest is that of the JSON object of their digests by name.
    """
    template = tokenizer.chat_template
    if not template:
        return None
    if isinstance(template, str):
        return sha256_bytes(_bytes(template))
    return sha256_json({name: sha256_bytes(_bytes(text)) for name, text in template.items()})


def stored_templates(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """The chat templates by the file that holds them, and by their own name; the main one is called `default`.

    The order is that in which transformers looks for them. Templates in the folder `additional_chat_templates` are
    listed under `chat_template.jinja`.
    """
    named = {PurePosixPath(name).stem: text for name, text in files.items() if name.startswith(f"{TEMPLATES_FOLDER}/")}
    separate = {**({"default": files[CHAT_TEMPLATE]} if CHAT_TEMPLATE in files else {}), **named}
    inside = {name: _listed(json_object(files, name).get(_TEMPLATE_KEY)) for name in (TOKENIZER_CONFIG, OLD_TEMPLATE)}
    return {name: found for name, found in {CHAT_TEMPLATE: separate, **inside}.items() if found}


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing.

    Raises:
        InputError: the file is not JSON, or not an object.
    """
    content = parse_json(files.get(name, b"{}"), where=name)
    if not isinstance(content, dict):
        raise InputError("must hold a JSON object", where=name)
    return content


def _listed(template: Any) -> dict[str, bytes]:
    if isinstance(template, str) and template:
        return {"default": _bytes(template)}
    if not isinstance(template, list):
        return {}
    pairs = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
    return {name: _bytes(text) for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
