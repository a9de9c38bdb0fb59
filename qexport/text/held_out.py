"""Windows of the held-out text, in the order in which verification uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase

from qexport.text.documents import Document, Documents
from qexport.text.windows import TooLittleText, make_windows

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
    """

    input_ids: torch.Tensor
    domains: tuple[str | None, ...]
    sha256: str
    origin: str
    left_out: tuple[str, ...] = ()


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

    def cut(text: Documents) -> torch.Tensor:
        found = make_windows(
            text, tokenizer, samples=windows, sequence_length=sequence_length, vocab_size=vocab_size, allow_fewer=True
        )
        return found.input_ids

    parts = documents.by_domain()
    found, short = _cut_each(parts, cut, len(parts) == 1)
    if short:
        items: tuple[Document, ...] = tuple(item for domain in short for item in parts[domain].items)
        rest, still_short = _cut_each({OTHER: Documents(items, documents.origin)}, cut, not found)
        for domain, ids in rest.items():  # the text may have a domain of that name
            found[domain] = torch.cat([found[domain], ids]) if domain in found else ids
        short = short if still_short else []
    order = list(_mixed({domain: len(ids) for domain, ids in found.items()}))[:windows]
    input_ids = torch.stack([found[domain][index] for domain, index in order])
    left_out = tuple(domain or "text without a domain" for domain in short)
    return HeldOut(input_ids, tuple(domain for domain, _ in order), documents.sha256, documents.origin, left_out)


def _cut_each(
    parts: Mapping[str | None, Documents], cut: Callable[[Documents], torch.Tensor], required: bool
) -> tuple[dict[str | None, torch.Tensor], list[str | None]]:
    """The windows of each part, and the parts that have none."""
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
