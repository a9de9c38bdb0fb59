"""SentencePiece's BPE, as tokenizer.json has it and as llama.cpp computes it (its tokenizer `llama`).

tokenizers joins two neighbours that stand in a list of merges, the earliest entry first. llama.cpp has no list: it
joins two neighbours wherever their text is a token, the token with the highest score first. Both give the same tokens
if the list has every pair of tokens that makes a token, and all pairs that make the same token one behind the other; a
token's score is then minus its place. Lists that were made from a file of SentencePiece are like that. The reference is
`src/llama-vocab.cpp` as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SPACE: Final = "\u2581"
"""What stands for a space inside a vocabulary."""

BYTES: Final = dict.fromkeys(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens of single bytes, for characters that are no tokens."""

_REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND: Final = {"type": "Prepend", "prepend": SPACE}
_WITHOUT_EFFECT: Final = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
_METASPACE: Final = {"type": "Metaspace", "replacement": SPACE, "split": False}
_DECODERS: Final = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]  # fmt: skip
_STRIP: Final = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_NOT_STRIPPED: Final = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Spaces:
    """What a tokenizer does with spaces.

    Attributes:
        prefix: one is put before a text, and behind each added token.
        exact: always, as llama.cpp does it; else only where there is none.
    """

    prefix: bool
    exact: bool = True


def spaces(content: Mapping[str, Any]) -> Spaces | None:
    """How a tokenizer treats spaces; None if its steps are not those of SentencePiece's BPE.

    Args:
        content: of tokenizer.json.
    """
    normalizers = _steps(content.get("normalizer"), "normalizers")
    splits = [each for each in _steps(content.get("pre_tokenizer"), "pretokenizers") if each != _WITHOUT_EFFECT]
    found = None
    if not splits and normalizers in ([_REPLACE], [_PREPEND, _REPLACE]):
        found = Spaces(prefix=_PREPEND in normalizers)
    elif not normalizers and len(splits) == 1:
        scheme = splits[0].get("prepend_scheme")
        if {key: value for key, value in splits[0].items() if key != "prepend_scheme"} == _METASPACE:
            found = Spaces(prefix=scheme != "never", exact=scheme == "never")
    if found is None or _steps(content.get("decoder"), "decoders") != _DECODERS + [_STRIP] * found.prefix:
        return None
    return found


def _steps(structure: Any, parts: str) -> list[Any]:
    if structure is None:
        return []
    return list(structure[parts]) if structure["type"] == "Sequence" else [structure]


def strips_behind(added: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether white space behind added tokens is dropped; None if llama.cpp cannot do it in this way.

    It does so for models whose name has `phi3`, behind all such tokens but three.

    Args:
        added: the value of `added_tokens` in tokenizer.json.
    """
    found = {token["content"] for token in added if token.get("rstrip")}
    if not found:
        return False
    names = {token["content"] for token in added}
    as_phi3 = names - set(_NOT_STRIPPED) == found and {"</s>", *_NOT_STRIPPED} <= names
    return True if as_phi3 else None


@dataclass(frozen=True)
class Joins:
    """Which tokens are made by joining two.

    Attributes:
        places: the place of each in the order in which they are made, by its text.
        problems: why llama.cpp would join others, or in another order.
    """

    places: Mapping[str, int]
    problems: Sequence[str]


def joins(model: Mapping[str, Any], apart: Collection[str]) -> Joins:
    """Holds a list of merges against what llama.cpp joins.

    Args:
        model: the value of `model` in tokenizer.json.
        apart: tokens that are found in a text before anything is joined, and so are never joined.
    """
    pairs = [tuple(each.split(" ", 1) if isinstance(each, str) else each) for each in model["merges"]]
    places, problems, last = dict[str, int](), list[str](), ""
    for left, right in pairs:
        text = left + right
        if text != last and text in places:
            problems.append(f"merges: the pairs that make {text!r} are not one behind the other")
        places.setdefault(text, len(places))
        last = text
    problems += _other_joins({text: None for text in model["vocab"] if text not in apart}, apart, set(pairs))
    return Joins({text: place for place, text in enumerate(text for text in places if text not in apart)}, problems)


def _other_joins(tokens: Collection[str], apart: Collection[str], pairs: Collection[tuple[str, ...]]) -> Iterator[str]:
    letters, never = ({text for text in some if len(text) == 1} for some in (tokens, apart))
    for text in tokens:
        if len(text) == 1 or text in BYTES or not never.isdisjoint(text):
            continue
        if not letters.issuperset(text):
            yield f"vocab: {text!r} has a character that is no token"
        for split in range(1, len(text)):
            left, right = text[:split], text[split:]
            if left in tokens and right in tokens and (left, right) not in pairs:
                yield f"merges: {left!r} and {right!r} make a token, and are not in the list"
