"""Whether an artifact is as it was written: the listing of its files' digests, and the check against it.

The listing `SHA256SUMS` has a line for every other file, as `sha256sum` writes it. It is the last file written, and its
own digest, the root digest, stands for the whole artifact. The manifest names no timings, so two runs write the same
manifest; the report holds some, so listing and root digest differ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from qexport.artifact.digests import sha256_bytes, sha256_file
from qexport.artifact.manifest import (
    LISTING_NAME,
    MANIFEST_NAME,
    REPORT_FOLDER,
    SIGNATURE_NAME,
    FileRecord,
    Manifest,
)
from qexport.artifact.partial import MARKER_NAME
from qexport.artifact.roots import confirm_root, recorded_roots
from qexport.errors import InputError, RecipeError

_LINE: Final = re.compile(r"([0-9a-f]{64})  ([^\n\r\\]+)\n")
LISTING_BYTES: Final = 1 << 24
_DEEPEST: Final = 8
_UNLISTED: Final = re.compile(rf"\.gitattributes|\.cache/(huggingface/.*)?|{re.escape(SIGNATURE_NAME)}")
"""What huggingface_hub puts beside the files of a repository, which no reader of ours opens; and the signature, which
covers the listing.
"""

_MEND: Final = "fetch the artifact again"


FileFault = Literal["changed", "missing", "unlisted"]


class FileProblem(InputError):
    """A file of an artifact is not as it was written.

    Args:
        what: one sentence.
        folder: the artifact.
        name: the file's path inside it.
        fault: what is wrong with it.
    """

    def __init__(self, what: str, folder: Path, name: str, fault: FileFault) -> None:
        mend = f"remove it, or {_MEND}" if fault == "unlisted" else _MEND
        super().__init__(what, where=str(folder / name), mend=mend)
        self.name = name
        self.fault = fault


@dataclass(frozen=True)
class Artifact:
    """A finished folder that was compared with its digests.

    Attributes:
        path: the folder.
        manifest: what its manifest says.
        root: the root digest; None if qexport 0.2 or older made the artifact, which digested neither manifest nor
            report.
        confirmed_by: what outside the folder has the same root digest; None if there is nothing to compare it with.
            Then the folder agrees with itself, and whoever changed a file may have changed its digests too.
        report_removed: the folder `report` was removed as a whole.
        unlisted: files of the model hub and the signature, which were not checked.
    """

    path: Path
    manifest: Manifest
    root: str | None = None
    confirmed_by: str | None = None
    report_removed: bool = False
    unlisted: Sequence[str] = ()

    @property
    def layout(self) -> str:
        """The layout's name."""
        return self.manifest.layout


def every_file(name: str) -> bool:
    """Selects all files."""
    return True


def find_artifact(path: Path, *, reads: Callable[[str], bool] = every_file, root: str | None = None) -> Artifact | None:
    """`open_artifact`, or None for a folder of another tool, which has neither manifest nor listing.

    Raises:
        InputError: as `open_artifact`; or manifest and listing are gone, but the folder's root digest is recorded.
    """
    if any(os.path.lexists(path / name) for name in (MANIFEST_NAME, LISTING_NAME)):
        return open_artifact(path, reads=reads, root=root)
    known = root or next(iter(recorded_roots(path)), None)
    if known is not None:
        raise _changed(f"the folder should have the root digest {known}, but has no {LISTING_NAME}", path)
    return None


def open_artifact(path: Path, *, reads: Callable[[str], bool] = every_file, root: str | None = None) -> Artifact:
    """Compares a folder with its listing, and the listing with the manifest and with a root digest.

    Args:
        path: the folder of one layout.
        reads: selects the files whose content is compared; by default all. Manifest and listing always are. Names are
            always compared: a file that nothing lists is refused, and so are links and special files.
        root: the root digest that the folder should have; None for the one recorded beside the folder, if there is one.

    Raises:
        InputError: a file is missing, changed, not listed, a link or no regular file; manifest and listing contradict
            each other; or the root digest is another.
    """
    found = entries(path)
    unlisted = [name for name in found if _UNLISTED.fullmatch(name)]
    names = set(found).difference(unlisted)
    if LISTING_NAME not in names:
        return _without_listing(path, names, unlisted, reads, root)
    content = _read(path / LISTING_NAME)
    digests = _parsed(content, path / LISTING_NAME)
    report = {name for name in digests if _is_of_report(name)}
    removed = bool(report) and not names & report
    kept = {name: digest for name, digest in digests.items() if not (removed and name in report)}
    _compare(path, names - {LISTING_NAME}, kept, lambda name: name == MANIFEST_NAME or reads(name))
    manifest = Manifest.read(path)
    _refuse_disagreement(path, manifest, digests, reads)
    digest = sha256_bytes(content)
    return Artifact(path, manifest, digest, confirm_root(path, digest, root), removed, unlisted)


def compare_with_listing(folder: Path) -> None:
    """Compares every file of a folder with its listing, whatever the folder holds: an artifact, or a release of some.

    Raises:
        InputError: the listing is missing or was changed; a file is missing, changed, not listed (but for a signature
            and what huggingface_hub adds), a link or no regular file.
    """
    names = {name for name in entries(folder) if not _UNLISTED.fullmatch(name)}
    if LISTING_NAME not in names:
        raise _changed(f"the listing of the digests, {LISTING_NAME}, is missing", folder)
    _compare(folder, names - {LISTING_NAME}, _parsed(_read(folder / LISTING_NAME), folder / LISTING_NAME), every_file)


def entries(folder: Path) -> list[str]:
    """The files below a folder, by their paths inside it, sorted; folders have a slash at the end.

    Raises:
        InputError: one is a link or no regular file, or a folder cannot be listed.
    """
    found: list[str] = []
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        if inside.count("/") > _DEEPEST:
            raise _changed("the folder has more levels than an artifact", folder / inside)
        for entry in _scanned(folder / inside):
            name = inside + entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
                found.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                found.append(name)
            else:
                kind = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
                raise _changed(f"an entry of the artifact is {kind}", folder / name)
    return sorted(found)


def refuse_inside_artifact(path: Path, what: str) -> None:
    """Refuses a path at which something is to be written, if it is inside an artifact.

    Args:
        path: need not exist.
        what: the path, for the message.

    Raises:
        RecipeError: the path or one of its parents is an artifact, whose listing would no longer be true.
    """
    real = Path(os.path.realpath(path))
    if any((each / MANIFEST_NAME).exists() for each in (real, *real.parents)):
        raise RecipeError(
            f"{what} is inside an artifact, which must not change", where=str(path), mend="name another folder"
        )


def digest_files(folder: Path, known: Mapping[str, str]) -> dict[str, FileRecord]:
    """Size and digest of every file in a folder except manifest, listing and report, by its path inside the folder.

    Args:
        folder: the artifact.
        known: digests that need not be computed again, by path.
    """
    return {
        name: FileRecord(size=(folder / name).stat().st_size, sha256=known.get(name) or sha256_file(folder / name))
        for name in entries(folder)
        if not (name.endswith("/") or name in (MANIFEST_NAME, LISTING_NAME, MARKER_NAME) or _is_of_report(name))
    }


def write_listing(folder: Path, manifest: Manifest) -> str:
    """Writes `SHA256SUMS`, when all other files of an artifact are in its folder.

    Args:
        folder: the artifact.
        manifest: the one that the folder holds.

    Returns:
        The root digest: that of the listing.
    """
    report = [name for name in entries(folder) if _is_of_report(name) and not name.endswith("/")]
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    digests |= {name: sha256_file(folder / name) for name in (MANIFEST_NAME, *report)}
    content = _text(digests).encode("utf-8")
    (folder / LISTING_NAME).write_bytes(content)
    return sha256_bytes(content)


def _without_listing(
    path: Path, names: set[str], unlisted: Sequence[str], reads: Callable[[str], bool], root: str | None
) -> Artifact:
    """An artifact of qexport 0.2 or older, whose manifest and report have no digests."""
    manifest = Manifest.read(path)
    if manifest.listing is not None or root is not None or recorded_roots(path):
        raise _changed(f"the listing of the artifact's digests, {LISTING_NAME}, is missing", path)
    own = {name for name in names if name == MANIFEST_NAME or _is_of_report(name)}
    _compare(path, names - own, {name: record.sha256 for name, record in manifest.files.items()}, reads)
    _refuse_sizes(path, manifest, reads)
    removed = manifest.verification is not None and not own - {MANIFEST_NAME, f"{REPORT_FOLDER}/"}
    return Artifact(path, manifest, report_removed=removed, unlisted=unlisted)


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise InputError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from error


def _is_of_report(name: str) -> bool:
    return name.startswith(f"{REPORT_FOLDER}/")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > LISTING_BYTES:
            raise _changed(f"{LISTING_NAME} has more than {LISTING_BYTES} bytes", path)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"a file of the artifact cannot be read: {error.strerror}", where=str(path)) from error


def _text(digests: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _parsed(content: bytes, path: Path) -> dict[str, str]:
    """The digests of a listing, by file; its bytes must be those that qexport writes."""
    text = content.decode("utf-8", errors="replace")
    found = {name: digest for digest, name in _LINE.findall(text)}
    if _text(found).encode("utf-8", errors="replace") != content:
        raise _changed(f"{LISTING_NAME} has changed since it was written", path)
    return found


def _compare(path: Path, names: set[str], digests: Mapping[str, str], reads: Callable[[str], bool]) -> None:
    """Compares the names in a folder with those listed, and the content of the selected files."""
    folders = {f"{parent}/" for name in digests for parent in _parents(name)} | {f"{REPORT_FOLDER}/"}
    if unknown := sorted(names - digests.keys() - folders):
        what = "a folder" if unknown[0].endswith("/") else "a file"
        raise FileProblem(f"{what} of the artifact is not listed", path, unknown[0], "unlisted")
    for name, digest in sorted(digests.items()):
        if name not in names:
            raise FileProblem("a file of the artifact is missing", path, name, "missing")
        if reads(name) and _digest(path / name) != digest:
            raise FileProblem("a file of the artifact has changed since it was written", path, name, "changed")


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(f"a file of the artifact cannot be read: {error.strerror}", where=str(path)) from error


def _refuse_disagreement(
    path: Path, manifest: Manifest, digests: Mapping[str, str], reads: Callable[[str], bool]
) -> None:
    """Manifest and listing have the same digests, and list each other and the report."""
    expected = {name: record.sha256 for name, record in manifest.files.items()}
    others = digests.keys() - expected.keys()
    report = {name for name in others if _is_of_report(name)}
    agree = {name: digests.get(name) for name in expected} == expected and others - report == {MANIFEST_NAME}
    if not agree or manifest.listing is None or bool(report) != (manifest.verification is not None):
        raise _changed(f"manifest and {LISTING_NAME} contradict each other", path)
    _refuse_sizes(path, manifest, reads)


def _refuse_sizes(path: Path, manifest: Manifest, reads: Callable[[str], bool]) -> None:
    for name, record in manifest.files.items():
        if reads(name) and (path / name).stat().st_size != record.size:
            what = "a file of the artifact has changed since it was written: its size is another"
            raise FileProblem(what, path, name, "changed")


def _changed(what: str, place: Path) -> InputError:
    return InputError(what, where=str(place), mend=_MEND)
