"""How a loaded model computes with its codes: what it keeps dequantized, and with which kernel it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qexport.amounts import parse_size
from qexport.errors import RecipeError

Kernel = Literal["exact", "int4"]
"""`exact` multiplies with the dequantized weight; `int4` with the codes, in torch's kernel for 4-bit weights."""

KERNELS: Final = ("exact", "int4")
DEFAULT_CACHE: Final = "1 GB"


@dataclass(frozen=True)
class Computing:
    """How quantized layers compute.

    Attributes:
        kernel: see `Kernel`.
        cache_bytes: how many bytes of dequantized weights the model may keep.
    """

    kernel: Kernel = "exact"
    cache_bytes: int = 0


EXACT: Final = Computing()
"""What verification uses: each product with the dequantized weight, and no memory beyond the artifact's."""


def parse_computing(kernel: str, cache: str | None) -> Computing:
    """The arguments of `qexport.load`.

    Args:
        kernel: one of `KERNELS`.
        cache: an amount such as `2 GB`; None to keep nothing.

    Raises:
        RecipeError: the kernel is not known, or the amount is none.
    """
    if kernel not in KERNELS:
        raise RecipeError(f"the kernel {kernel!r} is not known", where="kernel", mend=f"give {' or '.join(KERNELS)}")
    try:
        kept = 0 if cache is None else parse_size(cache)
    except ValueError as error:
        raise RecipeError(str(error), where="cache", mend="give an amount, or None to keep nothing") from error
    return Computing("int4" if kernel == "int4" else "exact", kept)


class WeightBudget:
    """The memory that the layers of one model share for dequantized weights.

    A layer keeps its weight from its first forward on, if there is room: the layers run in turn, so that one which made
    room for the next would be dequantized each time again.

    Args:
        limit: bytes.

    Attributes:
        used: bytes that are taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.used = limit, 0

    def take(self, count: int) -> bool:
        """Takes so many bytes if they are left."""
        if self.used + count > self._limit:
            return False
        self.used += count
        return True

    def give_back(self, count: int) -> None:
        """Makes room again."""
        self.used -= count
