"""Releases artifacts: proves each, makes its folder, and moves it to its destination. Needs the extra `release`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qexport.artifact.manifest import Manifest
from qexport.artifact.names import oci_tag
from qexport.artifact.partial import manifests_in
from qexport.errors import RecipeError
from qexport.progress import Notice, ProgressCallback
from qexport.registries import Destination, FolderDestination, OciDestination, Published, parse_destination, publish
from qexport.release import ReleaseSettings
from qexport.release.making import Released, make_release, refuse_existing
from qexport.release.naming import named
from qexport.release.packaging import package_of
from qexport.release.proof import prove
from qexport.release.signing import Signer
from qexport.reporting.card import license_problems

_HERE: Final = "."


@dataclass(frozen=True)
class ReleaseOptions:
    """The command line's; what is None comes from the recipe in each manifest."""

    to: str | None = None
    sign: Path | None = None
    version: str | None = None
    name: str | None = None
    allow_unproven: str | None = None


@dataclass(frozen=True)
class Made:
    """A release, and where it lies."""

    released: Released
    published: Published

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.released.record.name,
            "reference": self.published.reference,
            "digest": self.published.digest,
            "root": self.released.root,
            "signed": self.released.record.signed,
            "unproven": self.released.record.unproven,
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        record = self.released.record
        proof = f"NOT PROVEN: {record.unproven}" if record.unproven is not None else "all gates passed"
        signed = "signed" if record.signed else "not signed"
        return [
            f"release  {record.name}: {proof}; {signed}",
            f"         {self.published.reference}",
            f"root     {self.released.root}",
        ]


def release_of_run(settings: ReleaseSettings, artifact: Path, progress: ProgressCallback) -> list[Made]:
    """Releases what a run has published, as its recipe says."""
    sign = Path(settings.sign) if settings.sign else None
    return release_all([artifact], ReleaseOptions(settings.to, sign, settings.version, settings.name), progress)


def refuse_unusable(settings: ReleaseSettings) -> None:
    """Refuses what a run could not be released with, before its work.

    Raises:
        RecipeError: the destination is none, or the key cannot be used.
    """
    parse_destination(settings.to or _HERE)
    if settings.sign is not None:
        Signer(Path(settings.sign))


def release_all(artifacts: Sequence[Path], options: ReleaseOptions, progress: ProgressCallback) -> list[Made]:
    """Releases artifacts one by one. All are checked, and no destination is taken, before the first is made."""
    destination = parse_destination(options.to or _HERE)
    signer: Signer | None = Signer(options.sign) if options.sign else None
    folders = [folder for artifact in artifacts for folder in _layouts(artifact)]
    names = [named(Manifest.read(folder), model=options.name, version=options.version) for folder in folders]
    _refuse_equal([each.name for each in names], destination)
    if isinstance(destination, FolderDestination):
        for each in names:
            refuse_existing(destination.path / each.name)
    proven = [prove(folder, allow_unproven=options.allow_unproven) for folder in folders]
    for problem in dict.fromkeys(text for one in proven for text in license_problems(one.artifact.manifest.sources)):
        progress(Notice(problem))
    made = list[Made]()
    for one, name in zip(proven, names, strict=True):
        if isinstance(destination, FolderDestination):
            target = destination.path / name.name
            released = make_release(one, name, target, signer=signer)
            made.append(Made(released, Published(str(target), None)))
            continue
        with tempfile.TemporaryDirectory(prefix=".qexport-release-", dir=one.artifact.path.parent) as scratch:
            released = make_release(one, name, Path(scratch, name.name), signer=signer)
            place = _place_of(name.name, destination)
            made.append(Made(released, publish(package_of(released), place, progress=progress)))
    return made


def _is_repository(destination: Destination) -> bool:
    """Whether it is a repository of a registry, where each release has a tag of its own."""
    return isinstance(destination, OciDestination) and destination.tag is None and destination.digest is None


def _place_of(name: str, destination: Destination) -> Destination:
    """Where a release goes; in a repository its name is its tag."""
    if isinstance(destination, OciDestination) and _is_repository(destination):
        return replace(destination, tag=oci_tag(name))
    return destination


def _layouts(artifact: Path) -> list[Path]:
    """The folders of an artifact's layouts."""
    if not artifact.is_dir():
        raise RecipeError("there is no such folder", where=str(artifact), mend="give the folder of an artifact")
    return [manifest.parent for manifest in manifests_in(artifact)] or [artifact]


def _refuse_equal(names: Sequence[str], destination: Destination) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError("two artifacts have the same name", where=twice[0], mend="release them apart, with --name")
    if len(names) > 1 and not (isinstance(destination, FolderDestination) or _is_repository(destination)):
        raise RecipeError(
            "several artifacts need a place for each",
            where=str(destination),
            mend="name a folder, or a registry's repository without a tag, or release them one by one",
        )
