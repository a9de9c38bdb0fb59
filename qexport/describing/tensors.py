"""The tensors of a safetensors folder, a safetensors file or a GGUF file, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from qexport.tensors.safetensors_header import open_file, read_header
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME, read_index
from qexport.tensors.strict_files import contained_path

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header says it.

    Attributes:
        dtype: safetensors' name for it (`BF16`), or GGUF's (`Q4_0`).
        shape: in torch's order.
        nbytes: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def values(self) -> int:
        """How many values the shape has."""
        return prod(self.shape)


@dataclass(frozen=True)
class StoredTensors:
    """The weights of a model or an adapter.

    Attributes:
        tensors: by name.
        files: the names of their files, with the bytes of each.
        problems: what is wrong with them: files that are missing, tensors in two files or none.
    """

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    problems: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors.values())

    @property
    def by_dtype(self) -> dict[str, int]:
        """Bytes of the tensors of each dtype, the largest first."""
        found = Counter[str]()
        for each in self.tensors.values():
            found[each.dtype] += each.nbytes
        return dict(found.most_common())


def tensors_of_file(path: Path) -> StoredTensors:
    """The tensors of one safetensors file.

    Raises:
        InputError: it cannot be read, or its header is malformed.
    """
    return _joined([path], ())


def tensors_of_folder(folder: Path) -> StoredTensors:
    """The tensors of the files that the index names; else of `model.safetensors`, an adapter's file, or all there are.

    Raises:
        InputError: a header or the index is malformed, or a name leads out of the folder.
    """
    problems = [f"{path.name} is a pickle, which is never read" for kind in _PICKLES for path in folder.glob(kind)][:5]
    index = contained_path(folder, INDEX_NAME)
    if not index.is_file():
        single = [path for name in (SINGLE_NAME, ADAPTER_WEIGHTS) if (path := contained_path(folder, name)).is_file()]
        return _joined(single[:1] or sorted(folder.glob("*.safetensors")), problems)
    weight_map = read_index(index)
    paths = [contained_path(folder, name) for name in sorted(set(weight_map.values()))]
    problems += [f"{path.name} is missing, and the index names it" for path in paths if not path.is_file()]
    found = _joined([path for path in paths if path.is_file()], problems)
    if lost := [name for name in weight_map if name not in found.tensors]:
        problems.append(f"{len(lost)} tensors of the index are in no file, for example {lost[0]}")
    if more := [name for name in found.tensors if name not in weight_map]:
        problems.append(f"{len(more)} tensors are not in the index, for example {more[0]}")
    return StoredTensors(found.tensors, found.files, tuple(dict.fromkeys([*problems, *found.problems])))


def _joined(paths: Iterable[Path], problems: Iterable[str]) -> StoredTensors:
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, int] = {}
    found = list(problems)
    for path in paths:
        with open_file(path) as file:
            header = read_header(file, path)
        files[path.name] = path.stat().st_size
        for name, entry in header.entries.items():
            if name in tensors:
                found.append(f"{name} is in several files")
            tensors[name] = StoredTensor(entry.dtype, entry.shape, entry.nbytes)
    if not files and not found:
        found.append("no safetensors files")
    return StoredTensors(tensors, files, tuple(found))
