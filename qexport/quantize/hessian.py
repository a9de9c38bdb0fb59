"""The second moment of a layer's inputs, which GPTQ calls the Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 256
"""Columns of one strip. Only the strips' upper parts are multiplied, half of the square for a wide layer."""

_ROWS = 1024
"""Tokens that are copied to float32 at a time."""


class Hessian:
    """Sums `X^T X` over batches of inputs X [tokens, in], in float32, upper triangle only until it is read.

    Section 3 of arXiv:2210.17323 writes H = 2 X X^T with the inputs as columns; the factor drops out of every code.
    The batches must come in the same order with the same shapes for the sum to have the same bits.

    Args:
        in_features: the number of inputs.
        device: where to sum.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._complete = False
        self._sum = torch.zeros(in_features, in_features, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds a batch of inputs [..., tokens, in]."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += inputs.shape[0]
        for part in inputs.split(_ROWS):
            rows = part.to(torch.float32)
            for start in range(0, rows.shape[1], _COLUMNS):
                strip = rows[:, start : start + _COLUMNS]
                self._sum[start : start + _COLUMNS, start:].addmm_(strip.t(), rows[:, start:])

    def matrix(self) -> Tensor:
        """The mean of `x x^T` over the tokens: float32 [in, in], symmetric. A view, as long as nothing is added."""
        if not self._complete:
            self._sum.triu_()
            self._sum += self._sum.triu(1).t()
            self._sum /= max(self.tokens, 1)
            self._complete = True
        return self._sum
