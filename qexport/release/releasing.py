"""Releases artifacts: proves each, makes its folder, and moves it to its destination. Needs the extra `release`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qexport.artifact.integrity import refuse_inside_artifact
from qexport.artifact.manifest import Manifest
from qexport.artifact.names import oci_tag
from qexport.artifact.partial import manifests_in, scratch_folder
from qexport.artifact.roots import check_roots_path
from qexport.errors import RecipeError
from qexport.progress import Notice, ProgressCallback
from qexport.registries import (
    Destination,
    FolderDestination,
    LocalDestination,
    OciDestination,
    Published,
    parse_destination,
    publish,
    refuse_taken,
)
from qexport.release import ReleaseSettings
from qexport.release.making import Released, make_release
from qexport.release.naming import Named, Source, named
from qexport.release.packaging import package_of
from qexport.release.proof import Proven, prove
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


def refuse_taken_by_run(settings: ReleaseSettings, layouts: Sequence[Source], output: Path) -> None:
    """Refuses the places of a run's releases that are taken, before its work.

    Args:
        settings: the recipe's.
        layouts: what each release is called after.
        output: where the run will put the artifact.

    Raises:
        RecipeError: something is there, it is inside the artifact, or several layouts have one place.
        InputError: the place cannot be reached.
    """
    names = [named(each, model=settings.name, version=settings.version) for each in layouts]
    for place in _free_places(names, parse_destination(settings.to or _HERE)):
        if isinstance(place, LocalDestination) and Path(os.path.realpath(place.path)).is_relative_to(
            os.path.realpath(output)
        ):
            raise RecipeError(
                "the release's place is inside the artifact", where=str(place.path), mend="name another release.to"
            )


def release_all(artifacts: Sequence[Path], options: ReleaseOptions, progress: ProgressCallback) -> list[Made]:
    """Releases artifacts one by one. All are checked, and no destination is taken, before the first is made."""
    destination = parse_destination(options.to or _HERE)
    signer: Signer | None = Signer(options.sign) if options.sign else None
    folders = [folder for artifact in artifacts for folder in _layouts(artifact)]
    sources = [Source.of(Manifest.read(folder)) for folder in folders]
    names = [named(each, model=options.name, version=options.version) for each in sources]
    places = _free_places(names, destination)
    proven = [prove(folder, allow_unproven=options.allow_unproven) for folder in folders]
    for problem in dict.fromkeys(text for one in proven for text in license_problems(one.artifact.manifest.sources)):
        progress(Notice(problem))
    return [_release(*each, signer, progress) for each in zip(proven, names, places, strict=True)]


def _release(
    proven: Proven, name: Named, place: Destination, signer: Signer | None, progress: ProgressCallback
) -> Made:
    if isinstance(place, FolderDestination):
        released = make_release(proven, name, place.path, signer=signer)
        return Made(released, Published(str(place), None))
    with scratch_folder(_outermost(proven.artifact.path.absolute())) as scratch:
        released = make_release(proven, name, scratch / name.name, signer=signer)
        return Made(released, publish(package_of(released), place, progress=progress))


def _outermost(artifact: Path) -> Path:
    """The folder of several layouts that an artifact is in, else its own: what is made for a while is beside it, on the
    same disk, so that weights are linked, and no layout's neighbour.
    """
    return artifact.parent if manifests_in(artifact.parent) else artifact


def _free_places(names: Sequence[Named], destination: Destination) -> list[Destination]:
    """Where each release goes; nothing is at any of the places.

    Raises:
        RecipeError: something is at one of them, one is inside an artifact, or two releases have one place.
    """
    shared = not (isinstance(destination, FolderDestination) or _is_repository(destination))
    if len(names) > 1 and shared:
        raise RecipeError(
            "several artifacts need a place for each",
            where=str(destination),
            mend="name a folder, or a registry's repository without a tag, or release them one by one",
        )
    places = [_place_of(each.name, destination) for each in names]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise RecipeError(
                "two artifacts have the same name", where=name.name, mend="release them apart, with --name"
            )
        if isinstance(place, LocalDestination):
            refuse_inside_artifact(place.path.parent, "the release's place")
        if isinstance(place, FolderDestination):
            check_roots_path(place.path)
        refuse_taken(place, name.version)
    return places


def _is_repository(destination: Destination) -> bool:
    """Whether it is a repository of a registry, where each release has a tag of its own."""
    return isinstance(destination, OciDestination) and destination.tag is None and destination.digest is None


def _place_of(name: str, destination: Destination) -> Destination:
    """Where a release goes; in a folder its name is that of its own folder, in a repository its tag."""
    if isinstance(destination, FolderDestination):
        return FolderDestination(destination.path / name)
    if isinstance(destination, OciDestination) and _is_repository(destination):
        return replace(destination, tag=oci_tag(name))
    return destination


def _layouts(artifact: Path) -> list[Path]:
    """The folders of an artifact's layouts."""
    if not artifact.is_dir():
        raise RecipeError("there is no such folder", where=str(artifact), mend="give the folder of an artifact")
    return [manifest.parent for manifest in manifests_in(artifact)] or [artifact]
