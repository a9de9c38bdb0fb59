"""Codes of a few bits, packed as a little-endian bit stream into int32 words, the first code in the lowest bits."""

from __future__ import annotations

from math import gcd

import torch

WORD_BITS = 32


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs uint8 [rows, n] into int32 [rows, n * bits / 32]: code k starts at bit k * bits of its row."""
    unit, width = _unit(bits)
    codes = codes.reshape(codes.shape[0], -1, unit)
    packed = torch.zeros((*codes.shape[:2], width), dtype=torch.uint8)
    for index in range(unit):
        byte, shift = divmod(index * bits, 8)
        packed[:, :, byte] |= codes[:, :, index] << shift
        if shift + bits > 8:
            packed[:, :, byte + 1] |= codes[:, :, index] >> (8 - shift)
    return packed.flatten(1).view(torch.int32)


def from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpacks int32 [rows, n * bits / 32] into uint8 [rows, n]."""
    unit, width = _unit(bits)
    words = words.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of axes of size 1
    packed = words.view(torch.uint8).reshape(words.shape[0], -1, width)
    codes = torch.empty((*packed.shape[:2], unit), dtype=torch.uint8, device=words.device)
    for index in range(unit):
        byte, shift = divmod(index * bits, 8)
        code = packed[:, :, byte] >> shift
        if shift + bits > 8:
            code |= packed[:, :, byte + 1] << (8 - shift)
        codes[:, :, index] = code & ((1 << bits) - 1)
    return codes.flatten(1)


def _unit(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and the number of those bytes."""
    codes = 8 // gcd(bits, 8)
    return codes, codes * bits // 8
