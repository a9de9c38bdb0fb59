"""Conversations as the model's chat template writes them."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedTokenizerBase

from qexport.errors import InputError
from qexport.text.documents import Document

_FIXED_DATE: Final = "{%- macro strftime_now(format) -%}2024-01-01{%- endmacro -%}"
"""Stands before the template, so that one that writes today's date gives the same tokens every day."""

_MEND: Final = "set chat_template: false, or take a model whose chat template fits these conversations"


def render_chat(tokenizer: PreTrainedTokenizerBase, document: Document, *, reply: bool = False) -> str:
    """The text that the model sees. A plain text becomes a user's message.

    transformers runs the template in a sandbox of Jinja.

    Args:
        tokenizer: the model's.
        document: a text or a conversation.
        reply: end with the beginning of the assistant's answer.

    Raises:
        InputError: the tokenizer has no chat template, or the template does not take this conversation.
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
