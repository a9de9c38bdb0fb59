"""The second moment of a layer's inputs, which GPTQ calls the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_COLUMNS = 128
"""Columns of one strip. Only the strips' upper parts are multiplied, half of the square for a wide layer."""

_ROWS = 1024
"""Tokens that are multiplied at a time. From 2048 on, oneDNN divides the sum over the tokens among the threads, and its
bits depend on their number."""


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
        with _bfloat16_products(inputs.dtype):
            for part in inputs.split(_ROWS):
                self._add_rows(part.to(torch.float32))

    def _add_rows(self, rows: Tensor) -> None:
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


@contextmanager
def _bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 products round their factors to bfloat16, which changes nothing where they are bfloat16 values.

    The sums stay float32. CPUs with bfloat16 instructions are a quarter faster so; others compute as before.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to torch's own types
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
