"""Writing tensors directly to their places in files, in any order; and the record of what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from qexport.artifact.digests import sha256_bytes, sha256_chunks, tensor_bytes
from qexport.artifact.disk import sync
from qexport.errors import QexportError, ResourceError
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME

_CHUNK_BYTES = 1 << 22


class TensorWriter(Protocol):
    """Writes tensors into files of one container format."""

    digests: dict[str, str]
    written: dict[str, TensorSpec]
    places: dict[str, tuple[Path, int]]

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compares a tensor with the plan."""
        ...

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place."""
        ...

    def adopt(self, tensors: Mapping[str, Stored]) -> None:
        """Takes tensors that are in the files already as written."""
        ...

    def finish(self) -> tuple[str, ...]:
        """Completes the files and returns their names."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, with the hex SHA-256 of its bytes."""

    spec: TensorSpec
    sha256: str


class PlacedTensors:
    """Writes each planned tensor exactly once, to a place that is known in advance.

    Args:
        specs: every tensor that will come.
        places: the file of each tensor, and its offset there.

    Attributes:
        digests: the hex SHA-256 of the bytes of each tensor written so far.
        written: shape and dtype of each tensor written so far.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[Path, int]]) -> None:
        self.digests: dict[str, str] = {}
        self.written: dict[str, TensorSpec] = {}
        self.places = dict(places)
        self._specs = specs

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compares a tensor with the plan.

        Raises:
            QexportError: the tensor differs from the plan, or was written before.
        """
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name not in self._specs:
            raise QexportError("a tensor that was not planned has reached the export", where=name)
        if not self._specs[name].admits(found):
            raise QexportError(f"a tensor is {found} where {self._specs[name]} was planned", where=name)
        if name in self.digests:
            raise QexportError("a tensor has reached the export twice", where=name)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place.

        Args:
            name: one of the planned names.
            tensor: on the CPU, with the planned shape and dtype.

        Raises:
            QexportError: see `check`.
            OSError: the disk is full or failed.
        """
        self.check(name, tensor)
        content = tensor_bytes(tensor)
        write_at(*self.places[name], content)
        self.digests[name] = sha256_bytes(content)
        self.written[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)

    def adopt(self, tensors: Mapping[str, Stored]) -> None:
        """Takes tensors that an interrupted run has written as written. Their bytes are read and compared.

        Raises:
            ResourceError: the files do not hold them.
        """
        for name, stored in tensors.items():
            path, offset = self.places[name]
            if sha256_chunks(_pieces(path, offset, stored.spec.nbytes)) != stored.sha256:
                raise ResourceError(
                    "a tensor that an interrupted run has written is damaged",
                    where=f"{path}: {name}",
                    mend="check the disk, then begin again with --restart",
                )
            self.digests[name], self.written[name] = stored.sha256, stored.spec

    def refuse_missing(self) -> None:
        """Refuses to finish without a planned tensor.

        Raises:
            QexportError: a planned tensor was not written.
        """
        missing = [name for name in self._specs if name not in self.digests]
        if missing:
            raise QexportError(f"{len(missing)} tensors never reached the export", where=", ".join(missing[:5]))


def _pieces(path: Path, offset: int, count: int) -> Iterator[memoryview]:
    """A part of a file, in pieces; fewer bytes if the file ends before, none if there is no file."""
    if not path.exists():
        return
    with path.open("rb", buffering=0) as file:
        while count and (piece := os.pread(file.fileno(), min(_CHUNK_BYTES, count), offset)):
            yield memoryview(piece)
            offset, count = offset + len(piece), count - len(piece)


def write_at(path: Path, offset: int, content: memoryview) -> None:
    """Writes all of the content, into a new file if there is none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        write_fully(descriptor, offset, content)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, offset: int, content: memoryview) -> None:
    """Writes all of the content; one system call writes at most 2 GiB."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


@dataclass(frozen=True)
class WrittenWeights:
    """What is in a folder after `WeightWriter.finish`.

    Attributes:
        specs: every tensor.
        digests: the hex SHA-256 of each tensor's bytes.
        files: the hex SHA-256 of each file, by its name; see `FileDigests`.
    """

    specs: Mapping[str, TensorSpec]
    digests: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def link_into(self, source: Path, target: Path) -> None:
        """Puts the same files into another folder: as hard links if the file system can, else as copies."""
        for name in self.files:
            link_or_copy(source / name, target / name)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts the same file under a second path: a hard link if the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# In the order of safetensors files: wide types first, so that all tensors are aligned.
_DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
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
    """Fills one file after another in the given order. Headers do not count; a `LargestSpec` counts with its bound.

    Args:
        specs: every tensor of the artifact.
        max_shard_size: bytes of tensors in one file; a larger tensor gets its own file.
    """
    groups = split_by_size(specs, max_shard_size)
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, groups[0])]
    count = len(groups)
    return [Shard(f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, 1)]


def shard_files(specs: Mapping[str, TensorSpec], max_shard_size: int) -> dict[str, int]:
    """Bytes of each file that `ShardWriter` will write, by name; an upper bound where a `LargestSpec` is in it."""
    shards = plan_shards(specs, max_shard_size)
    sizes = {shard.name: len(_header(shard.specs)[0]) + _bytes(shard.specs) for shard in shards}
    return sizes | ({INDEX_NAME: len(_index(shards, _bytes(specs)).encode())} if len(shards) > 1 else {})


def split_by_size(specs: Mapping[str, TensorSpec], max_size: int) -> list[dict[str, TensorSpec]]:
    """Fills one group after another in the given order, each with at most `max_size` bytes but at least one tensor."""
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    return groups


class ShardWriter(PlacedTensors):
    """Writes tensors into the shards of a folder.

    Args:
        folder: an existing folder without safetensors files.
        specs: every tensor that will come.
        max_shard_size: bytes of tensors in one file.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_size: int) -> None:
        self._folder = folder
        self._shards = plan_shards(specs, max_shard_size)
        places: dict[str, tuple[Path, int]] = {}
        for shard in self._shards:
            header, offsets = _header(shard.specs)
            places |= {name: (folder / shard.name, len(header) + offset) for name, offset in offsets.items()}
        super().__init__(specs, places)

    def adopt(self, tensors: Mapping[str, Stored]) -> None:
        """See `PlacedTensors.adopt`. In shards that an interrupted run has completed, tensors are in other places."""
        for shard in self._shards:
            if shard.specs.keys() <= tensors.keys():
                header, offsets = _header({name: tensors[name].spec for name in shard.specs})
                path = self._folder / shard.name
                if b"".join(_pieces(path, 0, len(header))) == header:
                    self.places |= {name: (path, len(header) + offset) for name, offset in offsets.items()}
        super().adopt(tensors)

    def finish(self) -> tuple[str, ...]:
        """Closes the gaps after shorter vectors, and writes the headers, and an index if there are several shards.

        Returns:
            The names of all files.

        Raises:
            QexportError: a planned tensor never came, or a file has become shorter.
        """
        self.refuse_missing()
        for shard in self._shards:
            self._complete(self._folder / shard.name, {name: self.written[name] for name in shard.specs})
        names = tuple(shard.name for shard in self._shards)
        if len(names) == 1:
            return names
        index = _index(self._shards, _bytes(self.written))
        (self._folder / INDEX_NAME).write_text(index, encoding="utf-8")
        return (*names, INDEX_NAME)

    def _complete(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Adds the header. Tensors that are not at their final offsets are copied to those in a new file, which takes
        the place of the old one: whenever the run is stopped, one of the two files is whole.
        """
        header, offsets = _header(specs)
        moves = {name: (self.places[name][1], len(header) + offsets[name]) for name in specs}
        if all(source == target for source, target in moves.values()):
            write_at(path, 0, memoryview(header))
            os.truncate(path, len(header) + sum(spec.nbytes for spec in specs.values()))
            return
        moved = path.with_name(f"{path.name}.moved")
        write_at(moved, 0, memoryview(header))
        for name, (source, target) in moves.items():
            _copy(path, source, moved, target, specs[name].nbytes)
        sync(moved)
        moved.replace(path)


def _bytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _index(shards: Sequence[Shard], total_size: int) -> str:
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A file's header, and each tensor's offset after it."""
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


def _copy(path: Path, source: int, other: Path, target: int, count: int) -> None:
    """Copies bytes of a file into another one, in pieces."""
    for piece in _pieces(path, source, count):
        write_at(other, target, piece)
        target, count = target + len(piece), count - len(piece)
    if count:
        raise QexportError("a shard became shorter while it was written", where=str(path))
