"""SHA-256 of bytes, tensors, JSON values and files; large files are hashed in the background."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch


def sha256_bytes(content: bytes | memoryview) -> str:
    """The hex digest of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The hex digest of a file, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_chunks(chunks: Iterable[memoryview]) -> str:
    """The hex digest of bytes that come in pieces."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The hex digest of a JSON value, independent of the order of its keys.

    Raises:
        ValueError: the value holds NaN or Inf.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256_bytes(text.encode("ascii"))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy if it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


_PIECE: Final = 1 << 20


class FileDigests(Mapping[str, str]):
    """The hex SHA-256 of the files in a folder, by name; computed on first use, or in `hashed_in_background`.

    Hashing a model takes as long as reading it. A plan need not wait for it, and a run can do it while it computes.

    Args:
        folder: where the files are.
        names: the files to hash.
        known: digests that were computed before.
    """

    def __init__(self, folder: Path, names: Sequence[str], known: Mapping[str, str]) -> None:
        self._folder, self._names, self._found = folder, names, dict(known)
        self._all = sorted({*names, *known})
        self._thread: Thread | None = None
        self._stopped = Event()
        self._error: OSError | None = None

    def __getitem__(self, name: str) -> str:
        if name in self._all and name not in self._found:
            self._start().join()
            if self._error is not None:
                raise self._error
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def paths(self) -> dict[str, Path]:
        """The files by their names."""
        return {name: self._folder / name for name in self._all}

    @property
    def complete(self) -> bool:
        """Whether every digest is known, so that none has to be waited for."""
        return len(self._found) == len(self._all)

    @contextmanager
    def hashed_in_background(self) -> Iterator[None]:
        """Hashes in a thread. What is not finished when the context ends is waited for when it is used.

        If the context ends with an error, the thread ends too.
        """
        self._start()
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _start(self) -> Thread:
        if self._thread is None:
            self._thread = Thread(target=self._hash_all, name="digests", daemon=True)
            self._thread.start()
        return self._thread

    def _hash_all(self) -> None:
        try:
            for name in self._names:
                if (digest := self._digest(self._folder / name)) is None:
                    return
                self._found[name] = digest
        except OSError as error:
            self._error = error

    def _digest(self, path: Path) -> str | None:
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(piece):
                if self._stopped.is_set():
                    return None
                digest.update(piece[:size])
        return digest.hexdigest()


@contextmanager
def hashed_in_background(digests: Mapping[str, str]) -> Iterator[None]:
    """`FileDigests.hashed_in_background` for `FileDigests`; other mappings hold their digests already."""
    if isinstance(digests, FileDigests):
        with digests.hashed_in_background():
            yield
    else:
        yield
