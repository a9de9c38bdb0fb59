"""The names of an artifact: for people, for requests, and for programs that allow few characters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from qexport.artifact.digests import sha256_bytes
from qexport.references import GGUF_SUFFIX, gguf_part, is_first_part

_GGUF_STEM: Final = "model"
GGUF_NAME: Final = f"{_GGUF_STEM}{GGUF_SUFFIX}"
"""The file of the layout gguf, where it is one."""

_LABEL_LIMIT: Final = 63 - len("-predictor")  # which KServe adds
MODELPACK_SUFFIX: Final = "-modelpack"
"""Of the tag that stands for the ModelPack artifact alone, beside the release's own."""

_TAG_LIMIT: Final = 128 - len(MODELPACK_SUFFIX)
_MARK: Final = 8
"""Hex digits that tell two long names apart which begin alike."""


def gguf_names(parts: int) -> list[str]:
    """The files of the layout gguf: one, or several whose names count them."""
    return [GGUF_NAME] if parts == 1 else [gguf_part(_GGUF_STEM, number, parts) for number in range(1, parts + 1)]


def gguf_of(folder: Path) -> str | None:
    """The GGUF file of a model's folder, of several the first; None if there is none with the layout's names."""
    if (folder / GGUF_NAME).is_file():
        return GGUF_NAME
    parts = [path.name for path in folder.glob(f"{_GGUF_STEM}-*{GGUF_SUFFIX}") if path.is_file()]
    return next((name for name in sorted(parts) if is_first_part(name)), None)


def last_component(origin: str) -> str:
    """The part of a hub id, `package/file` or folder that people call the model by."""
    return origin.rpartition("/")[2]


def title(base: str, adapter: str | None) -> str:
    """What a model card, a report and a summary call the model: base and adapter."""
    return " + ".join(last_component(each) for each in (base, adapter) if each)


def model_name(base: str, adapter: str | None) -> str:
    """The name of a release whose recipe gives none: base and adapter, in lower case, as registries take them."""
    return "-".join(_plain(last_component(each)) for each in (base, adapter) if each)


def release_name(model: str, version: str, method: str, layout: str) -> str:
    """A release's name: `smollm2-release-notes-1.4.0+gptq-4bit`. Other layouts than safetensors stand behind it."""
    return f"{model}-{version}+{method}{'' if layout == 'safetensors' else f'.{layout}'}"


def label(name: str) -> str:
    """The nearest name that DNS, Kubernetes, KServe and Triton accept: lower-case letters, digits and dashes, a letter
    first, at most 53 characters. A longer one is cut, and ends in a digest of the whole.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    found = words if words[:1].isalpha() else f"model-{words}".strip("-")
    if len(found) <= _LABEL_LIMIT:
        return found
    return f"{found[: _LABEL_LIMIT - _MARK - 1].strip('-')}-{sha256_bytes(name.encode())[:_MARK]}"


def oci_tag(name: str) -> str:
    """The nearest tag that OCI registries accept, where `+` is not allowed: letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:_TAG_LIMIT]


def _plain(text: str) -> str:
    words = re.sub(r"[^a-z0-9._-]+", "-", text.lower().removesuffix(".gguf"))
    return re.sub(r"[._-]{2,}", "-", words).strip("._-") or "model"
