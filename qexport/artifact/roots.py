"""Root digests beside an artifact: `<output>.sha256` has the digest of each `SHA256SUMS` in `<output>/`.

It is a file as `sha256sum` writes it, with paths from the folder that both are in, so `sha256sum -c` reads it. Whoever
can change the artifact can change a file beside it as well: it protects only where it is kept elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Final

from qexport.artifact.disk import disk_failure, write_whole
from qexport.artifact.manifest import LISTING_NAME
from qexport.errors import InputError, RecipeError

_LINE: Final = re.compile(rf"([0-9a-f]{{64}})  ([^\n]+/{LISTING_NAME})\n")
_LIMIT: Final = 1 << 16
_OTHER: Final = "choose another output"


def roots_path(output: Path) -> Path:
    """The path of the file beside an output folder."""
    return output.with_name(f"{output.name}.sha256")


def check_roots_path(output: Path) -> None:
    """Checks, before any work, that the root digests may be written beside an output.

    Raises:
        RecipeError: something else is there, which would be replaced; or the output's name cannot be written in a line.
    """
    if set(output.name) & {"\n", "\r"} or output.name != output.name.encode(errors="replace").decode():
        raise RecipeError("the output's name has characters that are no text", where=repr(output.name), mend=_OTHER)
    path = roots_path(output)
    if os.path.lexists(path) and not _lines(path):
        raise RecipeError(
            "a file that is not qexport's is where the root digest is written",
            where=str(path),
            mend=f"move or remove it, or {_OTHER}",
        )


@contextmanager
def recording_roots(output: Path, roots: Mapping[str, str]) -> Iterator[None]:
    """Writes the root digests beside an output that the block moves to its path.

    While the output is replaced, the file has the old digests and the new ones: a process that is killed leaves one of
    the two artifacts, and either is found in the file.

    Args:
        output: the final path.
        roots: hex digests, by the folder of each layout inside the output; `.` for the output itself.

    Raises:
        OSError: the file could not be written.
    """
    path = roots_path(output)
    new = [(digest, str(PurePosixPath(output.name, inside, LISTING_NAME))) for inside, digest in roots.items()]
    old = [line for line in _lines(path) if line not in new]
    _write(path, [*new, *old])
    try:
        yield
    except BaseException:
        if not output.exists():
            path.unlink(missing_ok=True)
        raise
    if old:
        with suppress(OSError):  # the new digests are in the file already, and the output is in its place
            _write(path, new)


def recorded_roots(folder: Path) -> dict[str, Path]:
    """The root digests that are recorded for the folder of a layout, each with the file that has it.

    The first component of the paths is not compared: folder and file may have been renamed together.
    """
    own = Path(os.path.realpath(folder))
    places = {own: (LISTING_NAME,), own.parent: (own.name, LISTING_NAME)}
    return {
        digest: roots_path(output)
        for output, inside in places.items()
        if output.name  # the root of the file system has none
        for digest, name in _lines(roots_path(output))
        if PurePosixPath(name).parts[1:] == inside
    }


def confirm_root(folder: Path, root: str, given: str | None) -> str | None:
    """What confirms a root digest: `the given one`, `the one in <file>`, or None.

    Args:
        folder: of a layout.
        root: its root digest.
        given: the one that it should have; None if only the file beside the folder can tell.

    Raises:
        InputError: the root digest should be another.
    """
    known = {given.lower(): None} if given is not None else recorded_roots(folder)
    if not known:
        return None
    if root in known:
        path = known[root]
        return "the given one" if path is None else f"the one in {path.name}"
    path = next(iter(known.values()))
    raise InputError(
        f"the artifact is another, or was changed: its root digest is {root}, not {next(iter(known))}",
        where=str(folder) if path is None else f"{folder}, {path}",
        mend="fetch the artifact again"
        + ("" if path is None else f"; if it was replaced on purpose, remove {path.name}"),
    )


def _lines(path: Path) -> list[tuple[str, str]]:
    """Digest and path of each line; empty if the file is missing, or is not one of qexport's.

    Raises:
        OSError: the disk failed.
    """
    try:
        if not path.is_file() or path.stat().st_size > _LIMIT:
            return []
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if disk_failure(error, where=None):
            raise
        return []
    found = [(digest, name) for digest, name in _LINE.findall(text)]
    return found if _text(found) == text else []


def _write(path: Path, lines: list[tuple[str, str]]) -> None:
    """Replaces the file in one step. The lock on the temporary folder keeps out others."""
    write_whole(path, _text(lines), suffix=".partial")


def _text(lines: list[tuple[str, str]]) -> str:
    return "".join(f"{digest}  {name}\n" for digest, name in lines)
