"""A square matrix that is summed over the calibration text, all of it or a part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from qexport.quantizing.tiles import tile


class StripSum(ABC):
    """A sum over batches of tokens, [in, in] in float32, which is made strip by strip.

    The batches must come in the same order with the same shapes for the sum to have the same bits. A part of it, made
    of whole strips, has the same bits as in the whole.

    Args:
        in_features: the number of inputs.
        device: where to sum.
        part: the inputs whose strips are summed, from one strip's beginning to another's; None for all.

    Attributes:
        strip: inputs of a strip on the CPU.
        tokens: how many have been added.
        part: the inputs.
    """

    strip: ClassVar[int]

    def __init__(self, in_features: int, device: torch.device, part: range | None = None) -> None:
        self.tokens = 0
        self.part = range(in_features) if part is None else part
        self._in_features, self._device = in_features, device
        self._sum: Tensor | None = None  # until the first batch: it may be sent to another process before

    @abstractmethod
    def _of_part(self, whole: Tensor, part: range) -> Tensor:
        """The part of a whole sum, as a view."""

    @classmethod
    def strip_on(cls, device: torch.device) -> int:
        """Inputs of a strip on a device."""
        return tile(cls.strip, device)

    @property
    def total(self) -> Tensor:
        """What has been summed of the part."""
        if self._sum is None:
            shape = self._of_part(torch.empty(self._in_features, self._in_features, device="meta"), self.part).shape
            self._sum = torch.zeros(shape, device=self._device)
        elif self._sum.device != self._device:  # it comes from another process
            self._sum = self._sum.to(self._device)
        return self._sum

    @classmethod
    def joined(cls, parts: Sequence[Self], device: torch.device) -> Self:
        """The whole on a device, from all its parts. They are emptied."""
        whole = cls(parts[0]._in_features, device)
        whole.tokens = parts[0].tokens
        if len(parts) == 1:
            whole._sum, parts[0]._sum = parts[0].total.to(device), None
            return whole
        for part in parts:
            whole._of_part(whole.total, part.part).copy_(part.total)
            part._sum = None
        return whole
