"""The second moment of a layer's inputs, which GPTQ calls the Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 256
"""Columns of one strip. Only the strips' upper parts are multiplied, half of the square for a wide layer."""


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
        self._sum = torch.zeros(in_features, in_features, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds a batch of inputs [..., tokens, in]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.tokens += rows.shape[0]
        for start in range(0, rows.shape[1], _COLUMNS):
            strip = rows[:, start : start + _COLUMNS]
            self._sum[start : start + _COLUMNS, start:].addmm_(strip.t(), rows[:, start:])

    def matrix(self) -> Tensor:
        """The mean of `x x^T` over the tokens: float32 [in, in], symmetric."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).t()).div_(max(self.tokens, 1))
