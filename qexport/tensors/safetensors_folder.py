"""A folder of safetensors: one file, or shards with their index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from qexport.errors import InputError, listed
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME, read_index
from qexport.tensors.source import TensorSpec
from qexport.tensors.strict_files import contained_path

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT: Final = (
    "pickles run code when they are read; if you trust their maker, convert them once: "
    "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
)


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    A `WeightSource` and a context manager. Creating it reads only headers.

    Args:
        path: the folder.
        trusted_root: where symbolic links may lead; the folder itself if None. A snapshot in the hub's
            cache consists of links into the cache's blobs.

    Attributes:
        path: the folder.
        shards: the open files by name, in the order of their names.
        has_index: whether an index names the shards.

    Raises:
        InputError: no weights, or pickles only; and, all of them at once, everything wrong with index and shards: names
            that leave the folder, missing or malformed shards, tensors that index and shards do not agree on.
    """

    def __init__(self, path: Path, *, trusted_root: Path | None = None) -> None:
        self.path = path
        single, index = (contained_path(path, name, root=trusted_root) for name in (SINGLE_NAME, INDEX_NAME))
        self.has_index = index.is_file()
        if self.has_index and single.is_file():
            raise InputError(
                f"both {SINGLE_NAME} and {INDEX_NAME} are present, and they need not hold the same weights",
                where=str(path),
                mend="remove the one that is out of date",
            )
        if not self.has_index and not single.is_file():
            raise _no_weights(path)
        weight_map = read_index(index) if self.has_index else None
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        self.shards, problems = _open_shards(path, names, trusted_root)
        self._shard_of, twice = _locate(self.shards)
        problems += twice
        if weight_map is not None:
            problems += _disagreements(weight_map, self.shards, self._shard_of)
        if problems:
            self.close()
            raise InputError(
                "the weights are not complete or contradict themselves",
                where=f"{path}: {listed(problems)}",
                mend="fetch the model again",
            )

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, shape and dtype: shard by shard, in the order of the bytes."""
        return {name: spec for shard in self.shards.values() for name, spec in shard.specs().items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in newly allocated memory. Its values are not checked.

        Raises:
            InputError: there is no tensor with this name, or its file has become shorter.
        """
        return self._shard(name).read(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces; see `SafetensorsFile.chunks`."""
        return self._shard(name).chunks(name)

    def place(self, name: str) -> str:
        """The tensor's file and name, for an error's `where`."""
        return f"{self._shard(name).path}: {name}"

    def files(self) -> tuple[str, ...]:
        """The names of the files that the weights were read from, the index included."""
        return (*self.shards, *([INDEX_NAME] if self.has_index else []))

    def close(self) -> None:
        """Closes every shard."""
        for shard in self.shards.values():
            shard.close()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shard(self, name: str) -> SafetensorsFile:
        try:
            return self.shards[self._shard_of[name]]
        except KeyError:
            raise InputError("there is no tensor with this name", where=f"{self.path}: {name}") from None


def _no_weights(path: Path) -> InputError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return InputError("the weights are pickles, which are never read", where=f"{path}: {pickles[0]}", mend=_CONVERT)
    return InputError(
        f"the folder holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}",
        where=str(path),
        mend="name a folder that a transformers model was saved to as safetensors",
    )


def _open_shards(path: Path, names: list[str], root: Path | None) -> tuple[dict[str, SafetensorsFile], list[str]]:
    """The shards that could be opened, and what is wrong with the others."""
    shards: dict[str, SafetensorsFile] = {}
    problems: list[str] = []
    for name in names:
        try:
            shards[name] = SafetensorsFile(contained_path(path, name, root=root))
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # the cause says whether the disk has failed
                raise
            problems.append(f"{name}: {error.what} ({error.where})")
    return shards, problems


def _locate(shards: Mapping[str, SafetensorsFile]) -> tuple[dict[str, str], list[str]]:
    """The shard of each tensor, and the tensors that two shards hold."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for shard, file in shards.items():
        for name in file.specs():
            if name in found:
                problems.append(f"{name} is in {found[name]} and in {shard}")
            found.setdefault(name, shard)
    return found, problems


def _disagreements(
    weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile], shard_of: Mapping[str, str]
) -> list[str]:
    """Where index and shards differ. Shards that could not be opened are left out."""
    absent = [
        f"{name} is missing in {shard}, where the index has it"
        for name, shard in weight_map.items()
        if shard in shards and name not in shards[shard].specs()
    ]
    unnamed = [
        f"{name} is in {shard}, but not in the index" for name, shard in shard_of.items() if name not in weight_map
    ]
    return absent + unnamed
