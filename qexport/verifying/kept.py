"""What verifications of several artifacts against one reference have in common, in files: computed once, then read.

A result that was read has the bits of one that is computed. So the files of a folder must belong to one reference, one
version of every program and one kind of machine: whoever names the folder sees to that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from qexport.artifact.digests import sha256_bytes, sha256_json, tensor_bytes
from qexport.artifact.disk import sync

_DIGITS: Final = 32
"""Hex digits of a file's name."""


class Kept:
    """Results in a folder, each by its name and by all that it depends on besides the reference.

    Args:
        folder: where the files are; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @property
    def keeps(self) -> bool:
        """Whether results are kept."""
        return self._folder is not None

    def has(self, name: str, key: Any) -> bool:
        """Whether a result is there."""
        return self._folder is not None and self._path(self._folder, name, key).exists()

    def tensors(self, name: str, key: Any) -> dict[str, Tensor] | None:
        """Tensors on the CPU by their names; None if they were not kept.

        Args:
            name: what they are.
            key: JSON values: all that they depend on besides the reference.
        """
        if self._folder is None or not self.has(name, key):
            return None
        return load_file(self._path(self._folder, name, key))

    def keep_tensors(self, name: str, key: Any, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors; see `tensors`.

        Raises:
            OSError: the disk is full or failed.
        """
        if self._folder is not None:
            _write(self._path(self._folder, name, key), save({n: t.cpu().contiguous() for n, t in tensors.items()}))

    def value(self, name: str, key: Any) -> Any:
        """JSON values; None if they were not kept. Arguments as for `tensors`."""
        found = self.tensors(name, key)
        return None if found is None else json.loads(found["json"].numpy().tobytes())

    def keep_value(self, name: str, key: Any, value: Any) -> None:
        """Writes JSON values. Floats keep their bits.

        Raises:
            OSError: the disk is full or failed.
        """
        content = bytearray(json.dumps(value).encode("ascii"))
        self.keep_tensors(name, key, {"json": torch.frombuffer(content, dtype=torch.uint8)})

    def _path(self, folder: Path, name: str, key: Any) -> Path:
        return folder / f"{name}-{sha256_json(key)[:_DIGITS]}.safetensors"


NOTHING_KEPT: Final = Kept()


def _write(path: Path, content: bytes) -> None:
    """Writes a file beside its path, then renames it: one that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_bytes(content)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def digest_of(tensor: Tensor) -> str:
    """The hex digest of a tensor's bytes, for a key."""
    return sha256_bytes(tensor_bytes(tensor))


class KeptStates:
    """The hidden states of one model after its blocks, in some windows.

    Args:
        kept: the files.
        model: the model's name.
        windows: int64 [windows, sequence_length].
        at_once: windows in a batch.
        blocks: after which blocks states are kept; the last one is among them.
    """

    def __init__(self, kept: Kept, model: str, windows: Tensor, at_once: int, blocks: Collection[int]) -> None:
        self._kept, self.blocks, self._last = kept, frozenset(blocks), max(blocks)
        self._key = {"model": model, "windows": digest_of(windows), "at_once": at_once}

    @property
    def complete(self) -> bool:
        """Whether the states after all these blocks are there. They are written in the order of the blocks."""
        return all(self._kept.has("states", self._of(block)) for block in self.blocks)

    def read(self, block: int) -> list[Tensor]:
        """The states of each batch after a block, on the CPU."""
        found = self._kept.tensors("states", self._of(block))
        assert found is not None
        return [found[str(number)] for number in range(len(found))]

    def keep(self, block: int, states: Sequence[Tensor]) -> None:
        """Writes the states of each batch after a block, if they are to be kept."""
        if block in self.blocks:
            self._kept.keep_tensors(
                "states", self._of(block), {str(number): each for number, each in enumerate(states)}
            )

    def _of(self, block: int) -> dict[str, Any]:
        return {**self._key, "block": block}
