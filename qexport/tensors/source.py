"""Named tensors that are read one at a time, where they came from, and the check for NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class TensorSpec:
    """What a header says about a tensor, before any of its bytes is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def admits(self, found: TensorSpec) -> bool:
        """Whether a tensor with the specification `found` may be stored here."""
        return found == self


@dataclass(frozen=True)
class LargestSpec(TensorSpec):
    """A vector whose length, at most that of `shape`, is known only when it is computed."""

    def admits(self, found: TensorSpec) -> bool:
        """Whether `found` is such a vector."""
        return found.dtype == self.dtype and len(found.shape) == 1 and found.nbytes <= self.nbytes


class WeightSource(Protocol):
    """Where tensors come from: a folder, a GGUF file, a merge of a base and an adapter."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, in the source's order, with its shape and dtype."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a fresh, contiguous CPU tensor that the caller owns.

        Raises:
            InputError: the tensor is missing, cut short, or holds NaN or Inf.
        """
        ...


@runtime_checkable
class RoundingSource(WeightSource, Protocol):
    """A source that can round a tensor while it reads it, so that it is never in memory as it is stored."""

    def read_rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as `read` gives it, in another dtype if it is floating point; it may have overflowed there."""
        ...


_FLOAT8_AT_ONCE = 1 << 20


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a real tensor holds neither NaN nor Inf.

    One pass that allocates nothing: minimum and maximum carry both a NaN and an Inf. (`torch.isfinite(t).all()` makes
    temporaries of the tensor's size and takes some twenty times as long.) torch has no such function for 8-bit floats,
    so they are widened in pieces.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        return all(is_finite(part.to(torch.bfloat16)) for part in tensor.reshape(-1).split(_FLOAT8_AT_ONCE))
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


@dataclass(frozen=True)
class Terms:
    """On which terms a checkpoint or an adapter may be used, as its own card and files say.

    Attributes:
        license: its license by the hub's name, for example `apache-2.0`; None if the card names none.
        license_name: what the card calls a license that has no name on the hub.
        license_link: where that one is.
        languages: what the card says it understands.
        files: licenses and notices by their names inside the folder, byte for byte.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint or an adapter came from, without any path of this machine.

    Attributes:
        kind: a local folder, a local file, a model hub, or a file inside an installed package.
        name: the folder's or the file's last component, the hub id, or `package/file`.
        revision: the commit that a hub id resolved to, or the package's version.
        sha256: hex digest of each file read, by its name inside the folder.
        terms: its license.
        parts: what a combination of adapters was made of, with the weight of each; else empty.
        read_as: what its weights were turned into when they were read, for people; None if they are used as stored.
    """

    kind: Literal["folder", "file", "hub", "package", "combination"]
    name: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    terms: Terms = Terms()
    parts: tuple[tuple[Origin, float], ...] = ()
    read_as: str | None = None


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows of one length.

    Attributes:
        input_ids: int64 [samples, sequence_length].
        sha256: hex digest of the text that the tokens were made from.
        origin: the files' names or the dataset's id, without any path of this machine.
        start: the beginning-of-text token, with which every window begins; None if the model's texts have none.
    """

    input_ids: torch.Tensor
    sha256: str
    origin: str
    start: int | None = field(default=None, kw_only=True)
