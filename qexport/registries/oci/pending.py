"""Where unfinished uploads go on, kept for the next process: a killed push goes on with its layer, too."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from qexport.artifact.digests import sha256_bytes
from qexport.registries.destinations import OciDestination

_LIMIT: Final = 1 << 14
_KEPT: Final = 7 * 24 * 3600.0
"""Seconds; registries remove uploads after a week by default."""


class PendingUpload:
    """The address of one upload, in a file that only its user can read. Without such a place, nothing is kept.

    Args:
        destination: the repository.
        digest: of the blob.
    """

    def __init__(self, destination: OciDestination, digest: str) -> None:
        cache = os.environ.get("XDG_CACHE_HOME")
        self._folder = (Path(cache) if cache else Path.home() / ".cache") / "qexport" / "uploads"
        self._path = self._folder / sha256_bytes(f"{destination.host}/{destination.name}@{digest}".encode())

    def location(self) -> str | None:
        """The address, or None."""
        with suppress(OSError, UnicodeDecodeError):
            if self._path.stat().st_size <= _LIMIT:
                return self._path.read_text(encoding="utf-8")
        return None

    def keep(self, location: str) -> None:
        """Writes the address."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = self._path.with_suffix(f".{os.getpid()}")
            partial.touch(mode=0o600)
            partial.write_text(location, encoding="utf-8")
            partial.replace(self._path)

    def forget(self) -> None:
        """Removes the address, and those of uploads that no registry can still know."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            for other in self._folder.iterdir():
                if other.stat().st_mtime < time.time() - _KEPT:
                    other.unlink(missing_ok=True)
