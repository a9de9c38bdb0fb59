"""The command that measures the same again, for reports: it names no path of the machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_WORD: Final = re.compile(r"""(?:hub|pkg):[^\s,\[\]{}'"]+|[^\s,=:\[\]{}'"]+""")
_EXPLICIT: Final = ("./", "../", "/", "~")


def verify_command(
    artifact: str, reference: str, overrides: Sequence[str], options: Mapping[str, Sequence[str | Path | None]]
) -> str:
    """`qexport verify` with everything that decides what is measured.

    Local files and folders are named by their last component alone, hub ids and packages whole. An override of
    `output` is left out, since it measures nothing.

    Args:
        artifact: the folder's name.
        reference: a recipe or a model.
        overrides: `key=value` texts.
        options: further options with their values, None where one was not given.
    """
    words = ["qexport", "verify", artifact, "--reference", _portable(reference)]
    words += [_portable(each) for each in overrides if not each.startswith("output=")]
    for name, values in options.items():
        for value in values:
            words += [name, _portable(str(value))] if value is not None else []
    return shlex.join(words)


def _portable(text: str) -> str:
    return _WORD.sub(lambda word: _last_component(word[0]), text)


def _last_component(word: str) -> str:
    is_local = word.startswith(_EXPLICIT) or Path(word).exists()
    return (Path(word).name or word) if is_local else word
