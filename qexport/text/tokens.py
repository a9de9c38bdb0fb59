"""Texts and conversations into tokens, without changes to the tokenizer."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedTokenizerBase

from qexport.errors import InputError
from qexport.text.documents import Document


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


_FIXED_DATE: Final = "{%- macro strftime_now(format) -%}2024-01-01{%- endmacro -%}"
"""Prepended to the template, so that one that writes today's date gives the same tokens every day."""

_MEND: Final = "set chat_template: false, or use a model whose chat template fits these conversations"


def render_chat(tokenizer: PreTrainedTokenizerBase, document: Document, *, reply: bool = False) -> str:
    """The text that the model sees. A plain text becomes a user's message.

    transformers runs the template in a sandbox of Jinja.

    Args:
        tokenizer: the model's.
        document: a text or a conversation.
        reply: end with the beginning of the assistant's answer.

    Raises:
        InputError: the tokenizer has no chat template, or the template rejects this conversation.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", where=tokenizer.name_or_path, mend=_MEND)
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    try:
        template = _FIXED_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=reply, date_string="01 Jan 2024"
        )
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"the chat template cannot render a conversation: {error}",
            where=tokenizer.name_or_path,
            mend=_MEND,
        ) from error
    assert isinstance(text, str)
    return text
