"""Token windows of one length, cut from documents; and those of the held-out text in the order of verification."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Final, Literal

import torch
from transformers import PreTrainedTokenizerBase

from qexport.errors import InputError
from qexport.tensors import CalibrationSet
from qexport.text.documents import Document, Documents
from qexport.text.tokenizers import beginning_of_text, render_chat, tokenize

Packing = Literal["packed", "document"]


class TooLittleText(InputError):
    """The text has fewer windows than required."""


_CHARACTERS_PER_TOKEN: Final = 8
"""Characters of a long text to tokenize first, per token required; most text has 2 to 5 per token."""

_CUT_TOKENS: Final = 32
"""Tokens before a cut in the text; they may differ from those of the whole text, and are dropped."""


Window = tuple[list[int], list[int]]
"""The tokens of a window, and the number of the document that each is from, in the order in which they were read."""


@dataclass(frozen=True)
class Windows(CalibrationSet):
    """Token windows that know their documents.

    Attributes:
        documents: int64 [windows, sequence_length], the number of the document that a token is from.
        texts: what was tokenized for them, document after document.
    """

    documents: torch.Tensor
    texts: tuple[str, ...]


def make_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    vocab_size: int,
    packing: Packing = "packed",
    seed: int | None = None,
    chat_template: bool = False,
    allow_fewer: bool = False,
) -> Windows:
    """Cuts windows without padding or overlap.

    `packed` joins the documents, each followed by the end-of-text token unless it ends with it (conversations end as
    the template writes them), and cuts windows of `sequence_length` tokens. `document` takes the first
    `sequence_length` tokens of each document and skips those that have fewer. Special tokens at a document's start are
    the tokenizer's; where that is the beginning-of-text token, every window begins with it, since such models have seen
    no text without it (Gemma3-270M has a perplexity of 38 there, and 25 with it).

    Only as much text is tokenized as the windows need.

    Args:
        documents: the text.
        tokenizer: the model's; it is not changed.
        samples: windows to cut.
        sequence_length: tokens per window.
        vocab_size: the number of rows of the model's embedding.
        packing: see above.
        seed: decides which documents come first; None keeps their order.
        chat_template: render each document with the model's chat template.
        allow_fewer: accept fewer windows if the text is shorter; at least one.

    Returns:
        input_ids and documents int64 [samples, sequence_length].

    Raises:
        InputError: too little text, a conversation without `chat_template`, or an unsuitable template or tokenizer.
    """
    encode = _Tokenizing(tokenizer, chat_template)
    order = shuffled(documents.items, seed)
    cut = _packed if packing == "packed" else _one_per_document
    windows = list(islice(cut(order, encode, samples, sequence_length), samples))
    if not windows or (len(windows) < samples and not allow_fewer):
        raise _too_little(documents, encode, len(windows), samples, sequence_length, packing)
    input_ids = torch.tensor([ids for ids, _ in windows], dtype=torch.int64)
    _check_vocabulary(input_ids, vocab_size, tokenizer)
    return Windows(
        input_ids,
        documents.sha256,
        documents.origin,
        torch.tensor([owners for _, owners in windows], dtype=torch.int64),
        tuple(encode.texts),
        start=encode.start,
    )


def shuffled(items: Sequence[Document], seed: int | None) -> list[Document]:
    """The items in an order that depends on the seed alone (only `Random.random` is stable across Python versions)."""
    if seed is None:
        return list(items)
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


@dataclass
class _Tokenizing:
    """Turns documents into tokens, and counts them."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool
    tokens: int = 0
    longest: int = 0
    texts: list[str] = field(default_factory=list)

    def __call__(self, document: Document, limit: int) -> list[int]:
        """The document's first tokens, at most `limit`."""
        return self._counted(self._beginning(self._text(document), limit))

    def with_end(self, document: Document, limit: int) -> list[int]:
        """The document's first tokens, at most `limit`, followed by the end-of-text token."""
        ids = self._beginning(self._text(document), limit)
        if not self.chat_template and ids[-1:] != [self._end_of_text()]:
            ids.append(self._end_of_text())
        return self._counted(ids)

    @cached_property
    def start(self) -> int | None:
        """The token that begins every window; None for none."""
        return beginning_of_text(self.tokenizer)

    def _counted(self, ids: list[int]) -> list[int]:
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        return ids

    def _text(self, document: Document) -> str:
        if self.chat_template:
            return render_chat(self.tokenizer, document)
        if isinstance(document, str):
            return document
        raise InputError(
            "the text contains conversations, which need the model's chat template",
            mend="set chat_template: true, or use texts without conversations",
        )

    def _beginning(self, text: str, limit: int) -> list[int]:
        length = limit * _CHARACTERS_PER_TOKEN
        while True:
            ids = tokenize(self.tokenizer, text[:length], special_tokens=not self.chat_template)
            if length >= len(text) or len(ids) >= limit + _CUT_TOKENS:
                self.texts.append(text[:length])
                return ids[:limit]
            length *= 2

    def _end_of_text(self) -> int:
        token = self.tokenizer.eos_token_id
        if isinstance(token, int):
            return token
        raise InputError(
            "the tokenizer has no end-of-text token to join documents with",
            where=self.tokenizer.name_or_path,
            mend="set packing: document, or set eos_token in tokenizer_config.json",
        )


def _packed(order: list[Document], encode: _Tokenizing, samples: int, length: int) -> Iterator[Window]:
    tokens = (
        (token, number)
        for number, document in enumerate(order)
        for token in encode.with_end(document, samples * length)
    )
    while first := next(tokens, None):
        added = [] if encode.start in (None, first[0]) else [(encode.start, first[1])]
        window = [*added, first, *islice(tokens, length - len(added) - 1)]
        if len(window) < length:
            return
        ids, numbers = zip(*window, strict=True)
        yield list(ids), list(numbers)


def _one_per_document(order: list[Document], encode: _Tokenizing, samples: int, length: int) -> Iterator[Window]:
    for number, document in enumerate(order):
        ids = encode(document, length)
        if len(ids) == length:
            yield ids, [number] * length


def _too_little(
    documents: Documents, encode: _Tokenizing, found: int, samples: int, length: int, packing: Packing
) -> TooLittleText:
    if packing == "packed":
        missing = f"{samples * length - encode.tokens} tokens are missing"
    else:
        missing = (
            f"only {found} of {len(documents.items)} documents have {length} tokens, the longest has {encode.longest}"
        )
    return TooLittleText(
        f"too little text: {found} windows of {length} tokens where {samples} are required; {missing}",
        where=documents.origin,
        mend="give more text, or lower the number of windows or sequence_length",
    )


def _check_vocabulary(input_ids: torch.Tensor, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    largest = int(input_ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer produces the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"but the model has {vocab_size} tokens",
            where=tokenizer.name_or_path,
            mend="the tokenizer belongs to another model, or was extended after the model's embedding",
        )


OTHER: Final = "other"
"""The domain for the text of domains that are too small for a window."""


@dataclass(frozen=True)
class HeldOut:
    """Token windows of one length, without padding or overlap; none spans two domains.

    Attributes:
        input_ids: int64 [windows, sequence_length]. The first n, for any n, hold the domains in nearly their shares.
        domains: of each window; None if the text names none.
        sha256: the digest of the text, which does not depend on its domains.
        origin: the text's name.
        left_out: domains with too little text for a window.
        documents: int64 [windows, sequence_length], the number of the document that a token is from, rising within a
            domain; None if each window is a document of its own.
        texts: what the windows were cut from, document after document.
    """

    input_ids: torch.Tensor
    domains: tuple[str | None, ...]
    sha256: str
    origin: str
    left_out: tuple[str, ...] = ()
    documents: torch.Tensor | None = None
    texts: tuple[str, ...] = ()


def make_held_out(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, windows: int, sequence_length: int, vocab_size: int
) -> HeldOut:
    """Cuts each domain's text into windows, as `make_windows` does, and interleaves them.

    Domains with less than one window are joined as `other`, and left out if that has less than a window too.

    Args:
        documents: the text.
        tokenizer: the model's.
        windows: at most this many; fewer if the text is shorter.
        sequence_length: tokens per window.
        vocab_size: the number of rows of the model's embedding.

    Raises:
        InputError: the text is shorter than a window, or has tokens without a row in the embedding.
    """
    texts: list[str] = []

    def cut(text: Documents) -> torch.Tensor:
        found = make_windows(
            text, tokenizer, samples=windows, sequence_length=sequence_length, vocab_size=vocab_size, allow_fewer=True
        )
        texts.extend(found.texts)
        return torch.stack([found.input_ids, found.documents], dim=1)

    parts = documents.by_domain()
    found, short = _cut_each(parts, cut, len(parts) == 1)
    if short:
        items: tuple[Document, ...] = tuple(item for domain in short for item in parts[domain].items)
        rest, still_short = _cut_each({OTHER: Documents(items, documents.origin)}, cut, not found)
        for domain, ids in rest.items():  # the text may have a domain of that name
            found[domain] = _continued(found[domain], ids) if domain in found else ids
        short = short if still_short else []
    order = list(_mixed({domain: len(ids) for domain, ids in found.items()}))[:windows]
    both = torch.stack([found[domain][index] for domain, index in order])
    return HeldOut(
        both[:, 0].contiguous(),
        tuple(domain for domain, _ in order),
        documents.sha256,
        documents.origin,
        tuple(domain or "text without a domain" for domain in short),
        both[:, 1].contiguous(),
        tuple(texts),
    )


def _continued(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Windows [windows, 2, sequence_length] of tokens and documents after others, with numbers that go on."""
    second = second.clone()
    second[:, 1] += first[:, 1].max() + 1
    return torch.cat([first, second])


def _cut_each(
    parts: Mapping[str | None, Documents], cut: Callable[[Documents], torch.Tensor], required: bool
) -> tuple[dict[str | None, torch.Tensor], list[str | None]]:
    """The windows of each part, int64 [windows, 2, sequence_length], and the parts that have none."""
    found: dict[str | None, torch.Tensor] = {}
    short: list[str | None] = []
    for domain, text in parts.items():
        try:
            found[domain] = cut(text)
        except TooLittleText:
            if required:
                raise
            short.append(domain)
    return found, short


def _mixed(counts: Mapping[str | None, int]) -> Iterator[tuple[str | None, int]]:
    """Each domain's windows in their order, spread evenly over the result."""
    places = [
        ((index + 0.5) / count, position, domain, index)
        for position, (domain, count) in enumerate(counts.items())
        for index in range(count)
    ]
    return ((domain, index) for _, _, domain, index in sorted(places, key=lambda place: place[:2]))
