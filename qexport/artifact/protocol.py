"""How figures were measured, and on what: figures of another protocol or another text cannot be compared."""

from __future__ import annotations

from typing import Literal

from qexport.artifact.record import Record


class Identity(Record):
    """What must be the same for two reports' figures to be comparable."""

    base_sha256: str
    """One digest over the base model's files."""

    adapter_sha256: str | None
    text_sha256: str
    """The held-out text."""

    prompts_sha256: str | None
    tokenizer_sha256: str
    template_sha256: str | None
    """The chat template."""


class Protocol(Record):
    """The arithmetic of the figures."""

    perplexity: Literal["non-overlapping windows, every token but the first"] = (
        "non-overlapping windows, every token but the first"
    )
    """The convention: perplexities of other conventions are other figures."""

    dtype: str
    """What the blocks computed in; the output head computes in float32."""

    sequence_length: int
    """Tokens in a window."""

    stride: int
    """Tokens from one window's start to the next one's; equal to sequence_length."""

    windows: int
    tokens: int
    """Tokens that were predicted."""

    looks: list[int]
    """How many windows had been measured each time the gates were looked at."""

    confidence: float
    """Of every interval."""
