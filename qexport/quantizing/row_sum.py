"""A square matrix that is summed over the calibration text, all of it or some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

STRIP: Final = 128
"""Rows that are summed at a time, so that their bits are the same in the whole matrix and in a part of it."""


class RowSum:
    """A sum over batches of tokens, [in, in] in float32.

    The batches must come in the same order with the same shapes for the sum to have the same bits.

    Args:
        in_features: the number of inputs.
        device: where to sum.
        rows: the rows to sum, whose bounds are multiples of `STRIP` or the number of inputs; None for all.

    Attributes:
        upper: whether only what is right of the diagonal is summed.
        tokens: how many have been added.
        rows: the rows.
    """

    upper: ClassVar[bool]

    def __init__(self, in_features: int, device: torch.device, rows: range | None = None) -> None:
        self.tokens = 0
        self.rows = range(in_features) if rows is None else rows
        self._in_features, self._device = in_features, device
        self._sum: Tensor | None = None  # until the first batch: it may be sent to another process before

    @property
    def total(self) -> Tensor:
        """The sum of the rows so far, [rows, in]; without the columns left of the first row if it is an upper part."""
        if self._sum is None:
            width = self._in_features - (self.rows.start if self.upper else 0)
            self._sum = torch.zeros(len(self.rows), width, device=self._device)
        elif self._sum.device != self._device:  # it comes from another process
            self._sum = self._sum.to(self._device)
        return self._sum

    @classmethod
    def joined(cls, parts: Sequence[Self], device: torch.device) -> Self:
        """The whole on a device, from all its rows in their order. The parts are emptied."""
        whole = cls(parts[0]._in_features, device)
        whole.tokens = parts[0].tokens
        if len(parts) == 1:
            whole._sum, parts[0]._sum = parts[0].total.to(device), None
            return whole
        for part in parts:
            first = part.rows.start
            whole.total[first : part.rows.stop, first if cls.upper else 0 :] = part.total
            part._sum = None
        return whole
