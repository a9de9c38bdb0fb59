"""A model's chat template as two texts, around a user's message, so that a script needs no template engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from qexport.errors import InputError
from qexport.records import Record
from qexport.text.chat_templates import CHAT_TEMPLATES
from qexport.text.file_names import TOKENIZER_CONFIG
from qexport.text.tokenizers import json_object, stored_templates

_MESSAGE: Final = "qexport-message"
_OTHER: Final = " another\nmessage: <{1}> "
"""With spaces around it, which some templates take off."""

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTurn(Record):
    """What a chat template writes around one user's message, up to the beginning of the answer."""

    before: str
    """With its special tokens as text; the tokenizer must add none."""

    after: str

    stripped: bool
    """Whether the message loses the spaces around it."""


def chat_turn(files: Mapping[str, bytes]) -> ChatTurn | None:
    """What the model's chat template writes around a message; None if it has no template.

    The template runs in a sandbox, in a process with limits of time and memory; one that writes today's date writes
    1 January 2024.

    Args:
        files: the tokenizer's, by name.

    Raises:
        InputError: the template does not render a single message, or not as a text before and one after it.
    """
    template = next(iter(stored_templates(files).values()), {}).get("default")
    if template is None:
        return None
    try:
        source = template.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the chat template is not UTF-8", where=TOKENIZER_CONFIG) from error
    return _around(lambda message: _rendered(source, message, files))


def _around(render: Callable[[str], str]) -> ChatTurn:
    parts = render(_MESSAGE).split(_MESSAGE)
    if len(parts) == 2:
        before, after = parts
        found = render(_OTHER)
        for stripped, message in ((False, _OTHER), (True, _OTHER.strip())):
            if found == before + message + after:
                return ChatTurn(before=before, after=after, stripped=stripped)
    raise InputError("the chat template changes a message, or writes it more than once", where="chat template")


def _rendered(template: str, message: str, files: Mapping[str, bytes]) -> str:
    """As `qexport.text.tokenizers.render_chat`, without a tokenizer."""
    variables: dict[str, Any] = {
        **_special_tokens(files),
        "tools": None,
        "documents": None,
        "messages": [{"role": "user", "content": message}],
        "add_generation_prompt": True,
        "date_string": "01 Jan 2024",
    }
    return CHAT_TEMPLATES.render(template, variables, where="chat template")


def _special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Those that transformers gives to templates: a text, or an object with the text as `content`."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        content = json_object(files, name)
        for key in _SPECIAL:
            token = content.get(key)
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                tokens[key] = text
    return tokens
