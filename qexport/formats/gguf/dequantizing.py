"""Blocks of every type that the gguf package dequantizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from qexport.errors import CompatibilityError
from qexport.tensors.gguf_file import GgufFile

_CHUNK_VALUES: Final = 1 << 20
_FEWEST, _MOST = 2, 8


def dequantized(rows: NDArray[np.uint8], kind: GGMLQuantizationType, dtype: torch.dtype) -> Tensor:
    """The values of some rows, [rows, columns]. Some rows at a time, because `gguf.dequantize` holds its result twice.

    Args:
        rows: uint8 [rows, row_bytes].
        kind: how they are stored.
        dtype: of the result.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values = torch.empty((len(rows), rows.shape[1] // size * block), dtype=dtype)
    step = max(1, _CHUNK_VALUES // values.shape[1])
    for start in range(0, len(rows), step):
        values[start : start + step] = torch.from_numpy(gguf.dequantize(rows[start : start + step], kind))
    return values


def refuse_unreadable(file: GgufFile, names: Iterable[str] | None = None) -> None:
    """Refuses a file with tensors of a type that the gguf package cannot dequantize.

    Args:
        file: the file.
        names: of the tensors; all if None.

    Raises:
        CompatibilityError: there is one.
    """
    tensors: Mapping[str, GGMLQuantizationType] = {
        name: file.tensors[name].kind for name in (file.tensors if names is None else names)
    }
    for kind, name in {kind: name for name, kind in tensors.items()}.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise CompatibilityError(
                f"the gguf package cannot dequantize {kind.name}", where=f"{file.path}: {name}"
            ) from error


def bits_of(kind: GGMLQuantizationType) -> int:
    """The bits of a code, 2 to 8, which are the first number in the type's name: 4 for Q4_K and IQ4_XS."""
    found = re.search(r"\d", kind.name)
    return _MOST if found is None else min(max(int(found[0]), _FEWEST), _MOST)
