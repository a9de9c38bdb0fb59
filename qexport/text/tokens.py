"""Text into tokens, with the tokenizer left as it was."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool) -> list[int]:
    """The whole text's tokens: never truncated, never padded, without a warning that they are many.

    transformers switches truncation and padding off inside the tokenizer for such a call, and would write that into
    its tokenizer.json later; both are put back.

    Args:
        tokenizer: the model's.
        text: any text.
        special_tokens: let the tokenizer add what it adds at the beginning and the end.
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
