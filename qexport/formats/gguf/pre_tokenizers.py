"""The pre-tokenizers of llama.cpp, by the structure that tokenizer.json has of the same ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's.

    Attributes:
        name: the value of `tokenizer.ggml.pre`.
        ignores_merges: a piece that is a token stays one, whatever the merges say.
    """

    name: str
    ignores_merges: bool = False


def pre_tokenizer(structure: Any) -> PreTokenizer | None:
    """llama.cpp's pre-tokenizer of the same structure; None if there is none that was tried.

    Args:
        structure: the value of `pre_tokenizer` in tokenizer.json.
    """
    return _KNOWN.get(_canonical(_flat(structure)))


def named(name: str) -> PreTokenizer | None:
    """One of llama.cpp's pre-tokenizers; None if it was not tried.

    Args:
        name: the value of `tokenizer.ggml.pre`.
    """
    return next((known for known in _STRUCTURES if known.name == _SAME.get(name, name)), None)


def structure_of(known: PreTokenizer) -> dict[str, Any]:
    """The value of `pre_tokenizer` that tokenizer.json has for it."""
    steps = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in _STRUCTURES[known]]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _flat(structure: Any) -> list[dict[str, Any]]:
    """The steps, each without the values that change no token."""
    if structure is None:
        return []
    if structure["type"] == "Sequence":
        return [step for each in structure["pretokenizers"] for step in _flat(each)]
    step = {key: value for key, value in structure.items() if key not in _WITHOUT_EFFECT}
    return [{"use_regex": True, **step} if step["type"] == "ByteLevel" else step]


_WITHOUT_EFFECT: Final = ("trim_offsets",)


def _canonical(steps: list[dict[str, Any]]) -> str:
    return json.dumps(steps, sort_keys=True)


def _byte_level(*, splits: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _words(digits: str) -> str:
    """The expression of Llama 3 and of Qwen 2, which differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_STRUCTURES: Final[Mapping[PreTokenizer, list[dict[str, Any]]]] = {
    PreTokenizer("gpt-2"): [_byte_level()],
    PreTokenizer("smollm"): [{"type": "Digits", "individual_digits": True}, _byte_level()],
    PreTokenizer("llama-bpe", ignores_merges=True): [_split(_words(r"\p{N}{1,3}")), _byte_level(splits=False)],
    PreTokenizer("qwen2"): [_split(_words(r"\p{N}")), _byte_level(splits=False)],
    PreTokenizer("falcon"): [
        {"type": "Punctuation", "behavior": "Contiguous"},
        _byte_level(),
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ],
}

_SAME: Final[Mapping[str, str]] = {
    "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "jina-es": "gpt-2", "jina-de": "gpt-2",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "falcon-h1": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
}  # fmt: skip
"""Names that llama.cpp gives the same expressions (`src/llama-vocab.cpp`)."""

_KNOWN: Final = {_canonical(steps): found for found, steps in _STRUCTURES.items()}
