"""The license of a model or an adapter: what its card says, and the files of licenses and notices beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qexport.errors import InputError
from qexport.tensors.source import Terms
from qexport.tensors.strict_files import contained_path, read_bounded

CARD_NAME: Final = "README.md"
FILE_PATTERNS: Final = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*")
"""Of the files that travel with a model, as the hub's models call them."""

_LARGEST: Final = 1 << 20
_MOST: Final = 16
_FRONT: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.{0,65536}?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
_LINK: Final = re.compile(r"(https?://)?[A-Za-z0-9_./#?=&%~+-]{1,500}")


def read_terms(folder: Path, *, trusted_root: Path | None = None) -> Terms:
    """The terms in a folder. What is missing, malformed or too large counts as not said: a card is for people.

    Args:
        folder: of a model or an adapter.
        trusted_root: where symbolic links may lead; the folder itself if None.
    """
    card = _content(folder, CARD_NAME, trusted_root) or b""
    said = _front_matter(card.decode("utf-8", errors="replace"))
    found = {path.name for pattern in FILE_PATTERNS for path in folder.glob(pattern)}
    files = {name: _content(folder, name, trusted_root) for name in sorted(found)[:_MOST]}
    return Terms(
        license=_text(said.get("license"), _WORD),
        license_name=_text(said.get("license_name"), _WORD),
        license_link=_text(said.get("license_link"), _LINK),
        languages=_languages(said.get("language")),
        files={name: content for name, content in files.items() if content is not None},
    )


def _content(folder: Path, name: str, trusted_root: Path | None) -> bytes | None:
    try:
        path = contained_path(folder, name, root=trusted_root)
        return read_bounded(path, _LARGEST) if path.is_file() else None
    except (InputError, OSError):
        return None


def _front_matter(text: str) -> Mapping[str, Any]:
    found = _FRONT.match(text)
    if found is None:
        return {}
    try:
        content = YAML(typ="safe", pure=True).load(found[1])
    except (YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: Any, allowed: re.Pattern[str]) -> str | None:
    """Text that may stand in a card's metadata. A list of one license is that license."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and allowed.fullmatch(value) else None


def _languages(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values[:100] if isinstance(each, str) and _WORD.fullmatch(each))
