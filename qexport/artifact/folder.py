"""A finished folder: the digests of its files, and the check against its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qexport.artifact.digests import sha256_file
from qexport.artifact.manifest import MANIFEST_NAME, REPORT_FOLDER, FileRecord, Manifest
from qexport.artifact.publish import MARKER_NAME
from qexport.errors import InputError


@dataclass(frozen=True)
class Artifact:
    """A published folder.

    Attributes:
        path: the folder.
        manifest: what its manifest says.
    """

    path: Path
    manifest: Manifest

    @property
    def layout(self) -> str:
        """The layout's name."""
        return self.manifest.layout


def open_artifact(path: Path) -> Artifact:
    """Reads the manifest and checks every file against it.

    Raises:
        InputError: the manifest cannot be read; a file is missing, changed, or not in the manifest.
    """
    manifest = Manifest.read(path)
    found = dict(_files(path))
    for name in sorted(manifest.files.keys() | found.keys()):
        if fault := _fault(manifest.files.get(name), found.get(name)):
            raise InputError(f"a file of the artifact {fault}", where=str(path / name), mend="fetch the artifact again")
    return Artifact(path, manifest)


def digest_files(folder: Path, known: Mapping[str, str]) -> dict[str, FileRecord]:
    """Size and digest of every file in a folder except manifest and report, by its path inside the folder.

    Args:
        folder: the artifact.
        known: digests that need not be computed again, by path.
    """
    return {
        name: FileRecord(size=path.stat().st_size, sha256=known[name] if name in known else sha256_file(path))
        for name, path in _files(folder)
    }


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = name in (MANIFEST_NAME, MARKER_NAME) or name.startswith(f"{REPORT_FOLDER}/")
        if path.is_file() and not own:
            yield name, path


def _fault(record: FileRecord | None, path: Path | None) -> str | None:
    if path is None:
        return "is missing"
    if record is None:
        return "is not in its manifest"
    if path.stat().st_size != record.size or sha256_file(path) != record.sha256:
        return "has changed since it was written"
    return None
