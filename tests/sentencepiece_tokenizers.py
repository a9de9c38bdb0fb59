"""Tiny tokenizers of SentencePiece's kind, as tokenizer.json has them, and llama.cpp's way to tokenize by scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import factories
from qexport.formats.gguf.sentencepiece import BYTES, SPACE

PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
NO_SPACES: dict[str, Any] = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]  # fmt: skip


@dataclass(frozen=True)
class Style:
    """What kinds of such tokenizers differ in.

    Attributes:
        prefix: a space is put before each text, as for Llama 2; not so for Gemma.
        special: tokens of no text, in order: unknown, beginning and end of text first.
        found: tokens that are found in a text before it is joined.
    """

    prefix: bool
    special: Sequence[str]
    found: Sequence[str] = ()


LLAMA2 = Style(prefix=True, special=("<unk>", "<s>", "</s>"))
GEMMA = Style(
    prefix=False,
    special=("<unk>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
    found=("\n", "\n\n", "\n\n\n", "<table>"),
)
SPACED = replace(GEMMA, found=(*GEMMA.found, SPACE * 2, SPACE * 3))
"""With runs of spaces among the tokens that are found, as Gemma is published."""
PHI3 = Style(prefix=True, special=("<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "<|user|>"))


def pieces(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """The tokens that are joined from others, in order, and single characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=count, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    letters = [text for text in sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__) if len(text) == 1]
    return list(dict.fromkeys("".join(pair) for pair in merges)), letters


def content(style: Style, joined: Sequence[str], letters: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of a file of SentencePiece: the list of merges has every pair.

    Args:
        style: what it does around the vocabulary.
        joined: tokens that are joined from others, in order.
        letters: single characters.
    """
    texts = dict.fromkeys([*style.special, *style.found, *BYTES, *joined, *letters])
    vocabulary = {text: number for number, text in enumerate(texts)}
    skipped = {*style.special, *(text for text in style.found if SPACE not in text)}
    ordered = [text for text in (*style.found, *joined) if text not in skipped]
    merges = [pair for text in dict.fromkeys(ordered) for pair in _pairs(text, vocabulary, skipped)]
    added = [_added(text, vocabulary[text], special=text in style.special) for text in (*style.special, *style.found)]
    begin = style.special[1]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]} if style.prefix else REPLACE,
        "pre_tokenizer": None if style.prefix else NO_SPACES,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [vocabulary[begin]], "tokens": [begin]}},
        },
        "decoder": {"type": "Sequence", "decoders": DECODERS + [STRIP] * style.prefix},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


def _added(text: str, number: int, *, special: bool) -> dict[str, Any]:
    strip = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **strip, "special": special}


def _pairs(text: str, vocabulary: Mapping[str, int], skipped: set[str]) -> list[list[str]]:
    found = [(text[:split], text[split:]) for split in range(1, len(text))]
    known = [pair for pair in found if all(part in vocabulary and part not in skipped for part in pair)]
    return [list(pair) for pair in sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]


def tiny(style: Style, texts: Sequence[str] = factories.TEXT, count: int = 400) -> dict[str, Any]:
    """tokenizer.json of a tokenizer that was trained on some texts."""
    return styled(style, content(style, *pieces(texts, count)))


def styled(style: Style, found: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the white space behind added tokens that Phi 3 drops."""
    if style is PHI3:
        for token in found["added_tokens"]:
            token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return found


def fast(found: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json."""
    names = [token["content"] for token in found["added_tokens"][:3]]
    unknown, begin, end = names
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(found)), unk_token=unknown, bos_token=begin, eos_token=end
    )


def joined_by_scores(text: str, values: Mapping[str, Any]) -> list[int]:
    """The tokens of a text without special ones, as llama.cpp finds them: of all neighbours whose text is a token those
    with the highest score are joined first, the leftmost of equals; characters that are no tokens become bytes.

    Args:
        text: which is not empty.
        values: of a file's header.
    """
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    numbers = {token: number for number, token in enumerate(tokens)}
    symbols = list((" " * values["tokenizer.ggml.add_space_prefix"] + text).replace(" ", SPACE))
    while True:
        found = [(scores[numbers[a + b]], -place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in numbers]
        if not found:
            break
        place = -max(found)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    parts = [
        [numbers[each]] if each in numbers else [numbers[f"<0x{b:02X}>"] for b in each.encode()] for each in symbols
    ]
    return [number for part in parts for number in part]
