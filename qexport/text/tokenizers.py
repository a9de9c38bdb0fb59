"""Tokenizers: texts and conversations into tokens, and the identity of a tokenizer and its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from qexport.artifact.digests import sha256_bytes, sha256_json
from qexport.errors import InputError
from qexport.tensors.strict_files import parse_json
from qexport.text.chat_templates import CHAT_TEMPLATES, WITHOUT_TEMPLATE
from qexport.text.documents import Document
from qexport.text.file_names import CHAT_TEMPLATE, OLD_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool) -> list[int]:
    """The whole text's tokens: never truncated, never padded, without a warning about their number.

    transformers switches truncation and padding off inside the tokenizer for such a call, and would later write that
    into its tokenizer.json; both are restored.

    Args:
        tokenizer: the model's.
        text: any text.
        special_tokens: let the tokenizer add its special tokens at the beginning and the end.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (backend.truncation, backend.padding) if backend else (None, None)
    try:
        ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)
    finally:
        if backend and truncation:
            backend.enable_truncation(**truncation)
        if backend and padding:
            backend.enable_padding(**padding)
    tokens = ids["input_ids"]
    assert isinstance(tokens, list)
    return tokens


def beginning_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text; None if it puts none."""
    first = tokenize(tokenizer, "a", special_tokens=True)[:1]
    return first[0] if first == [tokenizer.bos_token_id] else None


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some tokens, without the beginning-of-text token that a server's tokenizer adds to it again."""
    first = beginning_of_text(tokenizer)
    own = ids[1:] if first is not None and ids[0] == first else ids
    return str(tokenizer.decode(list(own)))


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    *,
    reply: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text that the model sees. A plain text becomes a user's message.

    The template runs in a sandbox, in a process with limits of time and memory; a template that writes today's date
    writes the same one every day.

    Args:
        tokenizer: the model's.
        document: a text or a conversation.
        reply: end with the beginning of the assistant's answer.
        tools: functions that the model may call, as JSON; None for none.

    Raises:
        InputError: the tokenizer has no chat template, or the template rejects this conversation or breaks a limit.
    """
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    fixed = {"messages": messages, "add_generation_prompt": reply, "date_string": "01 Jan 2024"}
    variables = {
        **tokenizer.special_tokens_map,
        "tools": None if tools is None else list(tools),
        "documents": None,
        **fixed,
    }
    return CHAT_TEMPLATES.render(_template(tokenizer), variables, where=tokenizer.name_or_path)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", where=tokenizer.name_or_path, mend=WITHOUT_TEMPLATE)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(str(error), where=tokenizer.name_or_path, mend=WITHOUT_TEMPLATE) from error
    if not isinstance(template, str):
        raise InputError("the chat template is no text", where=tokenizer.name_or_path, mend=WITHOUT_TEMPLATE)
    return template


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
