"""Where releases go, as users write it: a folder, a tar file, an OCI registry or a model hub."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.errors import RecipeError
from qexport.references import is_hub_id

OCI_PREFIX: Final = "oci://"
HUB_PREFIX: Final = "hub:"

_HOST: Final = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(:(?P<port>[0-9]{1,5}))?", re.ASCII)
_NAME: Final = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,127}", re.ASCII)
_LONGEST_NAME: Final = 255
OCI_FORM: Final = "oci://HOST/NAME:TAG, for example oci://registry.example.com/models/notes:1.4.0"


@dataclass(frozen=True)
class LocalDestination:
    """A path on this machine.

    Attributes:
        path: of the folder or file.
        text: what the user wrote, if it is not the path.
    """

    path: Path
    text: str = ""

    def __str__(self) -> str:
        return self.text or str(self.path)


class FolderDestination(LocalDestination):
    """A local folder."""


class TarDestination(LocalDestination):
    """A local tar file."""


@dataclass(frozen=True)
class OciDestination:
    """A repository in an OCI registry, or one release in it.

    Attributes:
        host: with its port, if one was written.
        name: of the repository.
        tag: or None.
        digest: `sha256:...`, or None.
    """

    host: str
    name: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{OCI_PREFIX}{self.host}/{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is allowed."""
        return is_loopback(self.host)


@dataclass(frozen=True)
class HubDestination:
    """A model's repository on a hub, at a tag, branch or commit (the newest if None)."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repo_id}{f'@{self.revision}' if self.revision else ''}"


Destination = FolderDestination | OciDestination | HubDestination | TarDestination


def parse_destination(text: str) -> Destination:
    """What a text names: `oci://HOST/NAME[:TAG][@sha256:...]`, `hub:ORG/NAME[@REVISION]`, `FILE.tar`, or a folder.

    The form of the text decides, not what is on the disk. `~` is expanded.

    Raises:
        RecipeError: the text begins like a registry or a hub but names nothing there, or is empty.
    """
    if text.startswith(OCI_PREFIX):
        return _oci(text)
    if text.startswith(HUB_PREFIX):
        return _hub(text)
    if "://" in text:
        raise RecipeError("such a place is not known", where=text, mend=f"write {OCI_FORM}, hub:ORG/NAME or a path")
    if not text.strip() or "\0" in text:
        raise RecipeError("the place has no name", where=repr(text), mend="write a path, oci://... or hub:ORG/NAME")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise RecipeError("there is no such user", where=text, mend="write a path") from error
    return TarDestination(path, text) if path.suffix == ".tar" else FolderDestination(path, text)


def is_tag(text: str) -> bool:
    """Whether a registry accepts the text as a tag."""
    return _TAG.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its very name or address."""
    match = _HOST.fullmatch(host)
    name = match["name"].strip("[]") if match else ""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _oci(text: str) -> OciDestination:
    authority, _, path = text.removeprefix(OCI_PREFIX).partition("/")
    if "@" in authority:
        what = "a name or password in a reference would show in logs and process lists"
        mend = "put them into docker's config.json, and write oci://HOST/NAME:TAG"
        raise RecipeError(what, where=f"{OCI_PREFIX}...@{authority.rpartition('@')[2]}/{path}", mend=mend)
    if not _is_host(authority):
        raise RecipeError("the registry's host is not valid", where=text, mend=f"write {OCI_FORM}")
    named, at, digest = path.partition("@")
    name, colon, tag = named.partition(":")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        what = "the repository's name is not valid: registries want lower case, digits and single . _ - between them"
        raise RecipeError(what, where=text, mend=f"write {OCI_FORM}")
    if colon and not is_tag(tag):
        what = "the tag is not valid: registries want letters, digits, . _ - and at most 128 of them (no +)"
        raise RecipeError(what, where=text, mend="choose another tag")
    if at and not _DIGEST.fullmatch(digest):
        raise RecipeError("the digest is not sha256: and 64 hex digits", where=text, mend=f"write {OCI_FORM}")
    return OciDestination(authority, name, tag or None, digest or None)


def _is_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and (match["port"] is None or 0 < int(match["port"]) < 1 << 16)


def _hub(text: str) -> HubDestination:
    repo_id, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    if not is_hub_id(repo_id):
        raise RecipeError("this names no repository of a hub", where=text, mend="write hub:ORG/NAME")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise RecipeError("this is no tag, branch or commit", where=text, mend="write hub:ORG/NAME@TAG")
    return HubDestination(repo_id, revision or None)
