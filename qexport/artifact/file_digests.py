"""Digests of large files, taken beside other work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Final

_PIECE: Final = 1 << 20


class FileDigests(Mapping[str, str]):
    """The hex SHA-256 of the files in a folder, by name; taken when one is first asked for, or in `taken_meanwhile`.

    Hashing a model takes as long as reading it, which a plan need not wait for, and a run can do while it computes.

    Args:
        folder: where the files are.
        names: of the files to hash.
        known: digests that are there already.
    """

    def __init__(self, folder: Path, names: Sequence[str], known: Mapping[str, str]) -> None:
        self._folder, self._names, self._found = folder, names, dict(known)
        self._all = sorted({*names, *known})
        self._thread: Thread | None = None
        self._stopped = Event()
        self._error: OSError | None = None

    def __getitem__(self, name: str) -> str:
        if name in self._all and name not in self._found:
            self._begin().join()
            if self._error is not None:
                raise self._error
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @contextmanager
    def taken_meanwhile(self) -> Iterator[None]:
        """Takes the digests in a thread; what is not finished at the end is waited for when it is asked for.

        Where the context ends with an error, the thread ends too.
        """
        self._begin()
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _begin(self) -> Thread:
        if self._thread is None:
            self._thread = Thread(target=self._take, name="digests", daemon=True)
            self._thread.start()
        return self._thread

    def _take(self) -> None:
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
def taken_meanwhile(digests: Mapping[str, str]) -> Iterator[None]:
    """`FileDigests.taken_meanwhile` where the digests are such; nothing where they are there already."""
    if isinstance(digests, FileDigests):
        with digests.taken_meanwhile():
            yield
    else:
        yield
