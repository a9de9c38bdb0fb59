"""The arithmetic by which an adapter changes one tensor of the base.

Every change is computed in float32, in the order of operations of PEFT's own `merge`, so that a merge into bfloat16
gives the bits that PEFT gives if PEFT also rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from qexport.errors import InputError

ReadFactor = Callable[[str], torch.Tensor]
"""Reads one tensor of the adapter by its key, as float32, or as it is if it holds whole numbers."""


class Change(Protocol):
    """One step from the base's tensor to the merged one."""

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """The changed tensor in float32, of the same shape; `weight` has any floating dtype and is left as it is."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA (arXiv:2106.09685): W + scaling * B A, transposed where the base stores [in, out].

    Attributes:
        a: key of A [r, in].
        b: key of B [out, r].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
        transposed: the weight is [in, out]: GPT-2's Conv1D, and embeddings.
    """

    a: str
    b: str
    scaling: float
    transposed: bool

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        delta = _as_stored(read(self.b) @ read(self.a), self.transposed)
        return delta.mul_(self.scaling).add_(weight)


@dataclass(frozen=True)
class WeightDecomposed:
    """DoRA (arXiv:2402.09353, equation 5): the rows of the LoRA merge, scaled to learned norms.

    Attributes:
        low_rank: the direction.
        magnitude: key of the norms [out].
    """

    low_rank: LowRank
    magnitude: str

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        merged = self.low_rank.apply(weight, read)
        rows = merged.t() if self.low_rank.transposed else merged
        factor = (read(self.magnitude) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
        return merged.mul_(factor.t() if self.low_rank.transposed else factor)


@dataclass(frozen=True)
class SingularValues:
    """AdaLoRA (arXiv:2303.10512): W + scaling / rank * B diag(E) A.

    Attributes:
        a: key of A [r, in].
        e: key of E [r, 1].
        b: key of B [out, r].
        scaling: alpha.
        rank: the rank at the start of training; PEFT divides by it even if ranks were pruned.
        transposed: the weight is [in, out].
    """

    a: str
    e: str
    b: str
    scaling: float
    rank: int
    transposed: bool

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        delta = _as_stored(read(self.b) @ (read(self.a) * read(self.e)), self.transposed)
        # PEFT adds this so that it never divides by zero, in float32.
        divisor = torch.tensor(float(self.rank)) + 1e-5
        return delta.mul_(self.scaling).div_(divisor).add_(weight)


@dataclass(frozen=True)
class SharedProjections:
    """VeRA (arXiv:2310.11454): W + diag(b) B diag(d) A, with A and B shared by all layers and cut to size.

    Attributes:
        a: key of A [r, largest in].
        b: key of B [largest out, r].
        lambda_d: key of d [r].
        lambda_b: key of b [out].
        inputs: in.
        transposed: the weight is [in, out].
    """

    a: str
    b: str
    lambda_d: str
    lambda_b: str
    inputs: int
    transposed: bool

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        scale = read(self.lambda_b).unsqueeze(-1)
        up = scale * read(self.b)[: scale.shape[0]]
        down = read(self.lambda_d).unsqueeze(-1) * read(self.a)[:, : self.inputs]
        return _as_stored(up @ down, self.transposed).add_(weight)


@dataclass(frozen=True)
class Scale:
    """(IA)^3 (arXiv:2205.05638): the weight times a vector along its inputs or outputs; a bias times that vector.

    Attributes:
        vector: key of the vector, [out, 1] or [1, in].
        transposed: the weight is [in, out].
    """

    vector: str
    transposed: bool

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        vector = read(self.vector)
        if weight.dim() == 1:
            return weight * vector.reshape(weight.shape)
        return weight * (vector.t() if self.transposed else vector)


@dataclass(frozen=True)
class Add:
    """A vector added to the layer's bias: the bias of LoRA's B, or BEFT's.

    Attributes:
        term: key of the term, with as many values as the bias.
        scaling: as for the layer's LoRA.
    """

    term: str
    scaling: float

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        return read(self.term).view(weight.shape).mul_(self.scaling).add_(weight)


@dataclass(frozen=True)
class Replace:
    """A tensor that was trained as a whole.

    Attributes:
        tensor: key of the tensor, of the weight's shape.
    """

    tensor: str

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        return read(self.tensor)


@dataclass(frozen=True)
class ReplaceRows:
    """The embeddings of single tokens, trained in place of the base's.

    Attributes:
        rows: key of the new rows [tokens, dimensions].
        indices: the token of each row, without duplicates.
    """

    rows: str
    indices: tuple[int, ...]

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        return weight.to(torch.float32, copy=True).index_copy_(0, torch.tensor(self.indices), read(self.rows))


@dataclass(frozen=True)
class AddAt:
    """SHiRA (arXiv:2406.13175): values added at single places of the weight.

    Attributes:
        values: key of the values [places].
        places: key of their rows and columns, whole numbers [2, places].
    """

    values: str
    places: str

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`.

        Raises:
            InputError: a place is outside the weight.
        """
        places = read(self.places).long()
        size = torch.tensor(weight.shape).view(2, 1)
        if bool((places < 0).any()) or bool((places >= size).any()):
            raise InputError("places are outside the layer's weight", where=self.places, mend=_OTHER_BASE)
        delta = torch.sparse_coo_tensor(places, read(self.values), weight.shape)
        return weight.to(torch.float32, copy=True).add_(delta)


_OTHER_BASE = "give the base that the adapter was trained on"


def _as_stored(delta: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[out, in] in the layout of the weight: the layout decides the order, and so the bits, of DoRA's norms."""
    return delta.t().contiguous() if transposed else delta
