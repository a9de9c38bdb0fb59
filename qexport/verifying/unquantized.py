"""What differs between an unquantized tensor of an artifact and the reference's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_VALUES_AT_ONCE: Final = 1 << 21


def difference(stored: Tensor, wanted: Tensor, base: Tensor | None) -> str | None:
    """What differs, in words; None for equal tensors.

    Both are compared in the coarser one of their dtypes. Where the adapter changes the tensor, another program may have
    rounded the change before it was added: that may move a value by one step of the coarser dtype, relative to the
    larger one of value and change.

    Args:
        stored: the artifact's.
        wanted: the reference's, of the same shape.
        base: the same tensor without the adapter, if the adapter changes it.
    """
    if stored.dim() == 0:
        stored, wanted, base = stored[None], wanted[None], None if base is None else base[None]
    count, first, product, square = 0, -1, 0.0, 0.0
    for start, (own, other, before) in _strips(stored, wanted, base):
        if own.equal(other.to(own.dtype)):
            continue
        unequal = _unequal(own, other, before)
        if first < 0 and bool(unequal.any()):
            first = start + int(unequal.flatten(1).any(1).nonzero()[0])
        count += int(unequal.sum())
    if not count:
        return None
    for _, (own, other, _before) in _strips(stored, wanted, base):
        product += float((own.double() * other.double()).sum())
        square += float(other.double().square().sum())
    size = f", {product / square:.3g} times as large on the whole" if square else ""
    return f"{count} of {stored.numel()} values differ from row {first} on{size}"


def _strips(
    stored: Tensor, wanted: Tensor, base: Tensor | None
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]:
    step = max(1, _VALUES_AT_ONCE // max(1, stored[0].numel()))
    for start in range(0, len(stored), step):
        part = slice(start, start + step)
        rows = [each.reshape(len(each), -1)[part] for each in (stored, wanted)]
        yield start, (rows[0], rows[1], None if base is None else base.reshape(len(base), -1)[part])


def _unequal(own: Tensor, other: Tensor, base: Tensor | None) -> Tensor:
    """Bool, of the same shape."""
    if not own.is_floating_point() or not other.is_floating_point():
        return own != other
    coarser = max((own.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    unequal = (own != other.to(own.dtype)) & (own.to(coarser) != other.to(coarser))
    if base is None:
        return unequal
    one, two = own.to(torch.float32), other.to(torch.float32)
    step = torch.finfo(coarser).eps * torch.maximum(two.abs(), (two - base.to(torch.float32)).abs())
    return unequal & ((one - two).abs() > step)
