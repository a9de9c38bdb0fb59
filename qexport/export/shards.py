"""Writing safetensors files tensor by tensor.

All names, shapes and dtypes are known before the first tensor is, so every tensor goes straight to its place, in
whatever order they come. The headers are written last: a file that was not finished cannot be read. The bytes are those
of `safetensors.torch.save_file` with metadata `{"format": "pt"}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.artifact.digest import sha256_bytes, tensor_bytes
from qexport.errors import QexportError
from qexport.tensors import TensorSpec

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"

# In the order in which safetensors lays tensors out: wide types first, so that all are aligned.
_DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}


@dataclass(frozen=True)
class Shard:
    """One file to be written.

    Attributes:
        name: the file's name.
        specs: its tensors.
    """

    name: str
    specs: Mapping[str, TensorSpec]


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: int) -> list[Shard]:
    """Fills one file after the other in the order given; the sizes of headers do not count.

    Args:
        specs: every tensor of the artifact.
        max_shard_size: bytes of tensors in one file; a tensor that is larger gets a file of its own.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return [Shard(_SINGLE_NAME, groups[0])]
    count = len(groups)
    return [Shard(f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, 1)]


class ShardWriter:
    """Writes tensors into the shards of a folder, each exactly once.

    Args:
        folder: an existing folder without such files.
        specs: every tensor that will come.
        max_shard_size: bytes of tensors in one file.

    Attributes:
        digests: the hex SHA-256 of each tensor's bytes, as far as written.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_size: int) -> None:
        self.digests: dict[str, str] = {}
        self._folder = folder
        self._specs = specs
        self._shards = plan_shards(specs, max_shard_size)
        self._places: dict[str, tuple[Path, int]] = {}
        for shard in self._shards:
            header, offsets = _header(shard.specs)
            self._places |= {name: (folder / shard.name, len(header) + offset) for name, offset in offsets.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts one tensor into its place.

        Args:
            name: one of the planned names.
            tensor: on the CPU, with the planned shape and dtype.

        Raises:
            QexportError: the tensor was not planned so, or was written before.
            OSError: the disk is full or failed.
        """
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name not in self._specs:
            raise QexportError("a tensor that was not planned has reached the export", where=name)
        if found != self._specs[name]:
            raise QexportError(f"a tensor is {found} where {self._specs[name]} was planned", where=name)
        if name in self.digests:
            raise QexportError("a tensor has reached the export twice", where=name)
        content = tensor_bytes(tensor)
        _write_at(*self._places[name], content)
        self.digests[name] = sha256_bytes(content)

    def finish(self) -> tuple[str, ...]:
        """Writes the headers, and the index where there is more than one shard.

        Returns:
            The names of all files.

        Raises:
            QexportError: a planned tensor never came.
        """
        missing = [name for name in self._specs if name not in self.digests]
        if missing:
            raise QexportError(f"{len(missing)} tensors never reached the export", where=", ".join(missing[:5]))
        for shard in self._shards:
            _write_at(self._folder / shard.name, 0, memoryview(_header(shard.specs)[0]))
        names = tuple(shard.name for shard in self._shards)
        if len(names) == 1:
            return names
        (self._folder / INDEX_NAME).write_text(self._index(), encoding="utf-8")
        return (*names, INDEX_NAME)

    def _index(self) -> str:
        weight_map = {name: shard.name for shard in self._shards for name in shard.specs}
        total_size = sum(spec.nbytes for spec in self._specs.values())
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and each tensor's offset behind them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for name, spec in _in_file_order(specs):
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _in_file_order(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, TensorSpec]]:
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_RANK:
            raise QexportError(f"safetensors files cannot hold {spec.dtype} here", where=name)
    return iter(sorted(specs.items(), key=lambda item: (_DTYPE_RANK[item[1].dtype], item[0].encode())))


def _write_at(path: Path, offset: int, content: memoryview) -> None:
    """Writes all of it; one call of the system takes at most 2 GiB."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(descriptor)
