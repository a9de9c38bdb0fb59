"""Names and passwords for registries, from docker's config.json, which `docker login` and `oras login` write."""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qexport.errors import InputError

_LIMIT: Final = 1 << 20
_DOCKER_HUB: Final = ("docker.io", "index.docker.io", "https://index.docker.io/v1/")


@dataclass(frozen=True)
class Credentials:
    """A name and a password; the password is in no text that Python makes of it."""

    name: str
    password: str = field(repr=False)


def config_path() -> Path:
    """`config.json` in the folder `DOCKER_CONFIG`, by default `~/.docker`."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def find_credentials(host: str) -> Credentials | None:
    """The credentials of a registry; None if there are none. Programs that keep credentials are not asked.

    Raises:
        InputError: config.json cannot be read or is malformed; the message holds nothing of it.
    """
    path = config_path()
    try:
        if not path.exists():
            return None
        content = path.read_bytes() if path.stat().st_size <= _LIMIT else b""
        auths = json.loads(content).get("auths") or {}
        found = next((auths[key] for key in _keys(host) if auths.get(key)), None)
        return _parsed(found) if found else None
    except OSError as error:
        raise InputError(f"docker's config.json cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, AttributeError, TypeError, binascii.Error):
        raise InputError("docker's config.json is malformed", where=str(path), mend="docker login writes it") from None


def _keys(host: str) -> tuple[str, ...]:
    return _DOCKER_HUB if host in _DOCKER_HUB else (host, f"https://{host}", f"https://{host}/v2/")


def _parsed(entry: dict[str, Any]) -> Credentials | None:
    if entry.get("auth"):
        name, colon, password = base64.b64decode(entry["auth"], validate=True).decode("utf-8").partition(":")
        if not colon:
            raise ValueError
        return Credentials(name, password)
    if entry.get("username") and entry.get("password"):
        return Credentials(str(entry["username"]), str(entry["password"]))
    return None
