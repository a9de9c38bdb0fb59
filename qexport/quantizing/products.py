"""Products of a block's forward whose bits do not depend on the number of threads.

torch gives one product to all of its threads, and how oneDNN and MKL divide it changes some bits: measured for layers
in bfloat16 on CPUs with AMX, and for layers in float32 with 300 rows on AVX-512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qexport.architectures.devices import single_thread
from qexport.quantizing.factorization import Task, side_by_side

ROWS: Final = 1024
"""Tokens of one product."""

COLUMNS: Final = 1024
"""Outputs of one product."""


class FixedProducts(TorchDispatchMode):
    """Inside, a layer's product on the CPU is cut into pieces of fixed shapes, and one thread computes each.

    Products of batches of matrices, as in attention, stay as they are: torch gives each matrix to one thread.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Takes `x @ w` and `bias + x @ w` apart."""
        if func not in _PRODUCTS or kwargs or args[-1].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        *bias, left, right = args
        if len(left) <= ROWS and right.shape[1] <= COLUMNS:
            with single_thread():
                return func(*args)
        result = left.new_empty(len(left), right.shape[1])
        with side_by_side(left.device) as run:
            run(_pieces(_PRODUCTS[func], bias, left, right, result))
        return result


_PRODUCTS: Final[Mapping[Any, Callable[..., Tensor]]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
}


def _pieces(
    product: Callable[..., Tensor], bias: Sequence[Tensor], left: Tensor, right: Tensor, result: Tensor
) -> Iterator[Task]:
    def compute(rows: slice, columns: slice) -> None:
        of_columns = [each.expand_as(result)[rows, columns] for each in bias]
        product(*of_columns, left[rows], right[:, columns], out=result[rows, columns])

    for row in range(0, len(left), ROWS):
        for column in range(0, right.shape[1], COLUMNS):
            yield partial(compute, slice(row, row + ROWS), slice(column, column + COLUMNS))
