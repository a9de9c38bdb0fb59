"""The files of two sides: weights that no parameter stands for by their digests, small files by their content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME, REPORT_FOLDER
from qexport.comparing.documents import DocumentDifference, compare_bytes, compare_files, compare_json, compare_text
from qexport.comparing.sides import Side
from qexport.errors import InputError
from qexport.tensors.strict_files import contained_path, read_bounded
from qexport.text.file_names import CHAT_TEMPLATE, OLD_TEMPLATE, TEMPLATES_FOLDER
from qexport.text.tokenizers import stored_templates

_WEIGHTS: Final = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".bin", ".pt", ".pth", ".ckpt")
_EVIDENCE: Final = (MANIFEST_NAME, LISTING_NAME)
_LIMIT: Final = 1 << 27
_MOST_PATHS: Final = 2000
_DEEPEST: Final = 8
_KEY: Final = "chat_template"


@dataclass(frozen=True)
class Files:
    """The files of one side.

    Attributes:
        small: the content by name.
        weights: the paths of files with weights, by name.
        read: those of them all of whose content is compared as parameters.
        templates: the chat templates that transformers takes, by their own names.
        holder: the file that stands for them; None if there are none.
    """

    small: Mapping[str, bytes]
    weights: Mapping[str, Path]
    read: frozenset[str]
    templates: Mapping[str, bytes]
    holder: str | None

    def key_in(self, name: str) -> str | None:
        """The key of a file that is compared as a template."""
        return _KEY if name == self.holder else None

    def is_template(self, name: str) -> bool:
        """Whether the whole file is compared as a template."""
        if self.holder != CHAT_TEMPLATE:
            return False
        path = PurePosixPath(name)
        return name == CHAT_TEMPLATE or (str(path.parent) == TEMPLATES_FOLDER and path.suffix == ".jinja")


def listed_files(path: Path) -> list[str]:
    """The names of the files in a folder that are no evidence, sorted; none for a file.

    Raises:
        InputError: there are more of them, or in deeper folders, than are compared.
    """
    if not path.is_dir():
        return []
    paths = list(islice(path.rglob("*"), _MOST_PATHS + 1))
    names = sorted(each.relative_to(path).as_posix() for each in paths)
    deep = next((name for name in names if name.count("/") > _DEEPEST), None)
    if len(names) > _MOST_PATHS or deep is not None:
        what = f"more than {_MOST_PATHS} files and folders" if deep is None else f"more than {_DEEPEST} levels: {deep}"
        raise InputError(
            f"the folder has {what}", where=str(path), mend="remove what is not the model's, or give --weights"
        )
    kept = (name for name in names if name not in _EVIDENCE and not name.startswith(f"{REPORT_FOLDER}/"))
    return [name for name in kept if (path / name).is_file()]


def files_of(path: Path, names: Sequence[str], side: Side) -> Files:
    """The files of a side.

    Args:
        path: the folder or the file.
        names: from `listed_files`.
        side: what was opened there.

    Raises:
        InputError: a small file is too large, or a link leads out of the folder.
    """
    if side.checkpoint is not None:
        small = {"config.json": json.dumps(dict(side.checkpoint.config)).encode(), **side.checkpoint.files}
        weights = dict[str, Path]()
    else:
        paths = {name: contained_path(path, name) for name in names}
        weights = {name: each for name, each in paths.items() if name.endswith(_WEIGHTS)}
        small = {name: read_bounded(each, _LIMIT) for name, each in paths.items() if name not in weights}
    try:
        holder, templates = next(iter(stored_templates(small).items()), (None, {}))
    except InputError:  # the file itself is compared
        holder, templates = None, {}
    return Files(small, weights, side.weights, templates, holder)


def different_files(a: Files, b: Files) -> Iterator[DocumentDifference]:
    """The files that differ, then the templates."""
    for name in dict.fromkeys([*a.weights, *b.weights]):
        sides = [each for each in (a, b) if name in each.weights]
        if any(name not in each.read for each in sides):
            found = compare_files(name, a.weights.get(name), b.weights.get(name))
            if found is not None:
                yield found
    for name in dict.fromkeys([*a.small, *b.small]):
        if (found := _compare_small(name, a, b)) is not None:
            yield found
    for name in dict.fromkeys([*a.templates, *b.templates]):
        label = "chat template" if name == "default" else f"chat template {name}"
        if (found := compare_text(label, _text(a, name), _text(b, name))) is not None:
            yield found


def _compare_small(name: str, a: Files, b: Files) -> DocumentDifference | None:
    ours, theirs = (None if each.is_template(name) else each.small.get(name) for each in (a, b))
    if name == OLD_TEMPLATE:  # a file for the template alone
        ours = b"{}" if ours is None else ours
        theirs = b"{}" if theirs is None else theirs
    if ours is None or theirs is None or not name.endswith(".json"):
        return compare_bytes(name, ours, theirs)
    return compare_json(name, ours, theirs, without=(a.key_in(name), b.key_in(name)))


def _text(files: Files, name: str) -> str | None:
    content = files.templates.get(name)
    return None if content is None else content.decode("utf-8", errors="backslashreplace")
