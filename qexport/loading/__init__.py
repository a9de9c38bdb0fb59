"""Where a base model and its adapter come from: the recipe's `load`."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, model_validator

from qexport.records import added
from qexport.references import PACKAGE_PREFIX, is_explicit_path, names_gguf
from qexport.settings import Settings

_MOST_ADAPTERS: Final = 32


def _inside(text: str) -> str:
    parts = text.split("/")
    if "\\" in text or not all(parts) or {".", ".."} & {*parts}:
        raise ValueError(f"{text!r} is no folder inside a repository: write it as folder or folder/folder")
    return text


Subfolder = Annotated[str, AfterValidator(_inside)]
"""A folder inside a repository of the hub, with slashes."""


class WeightedAdapter(Settings):
    """One of several adapters."""

    path: str
    """A PEFT adapter: a folder or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    subfolder: Subfolder | None = added()
    """The folder of the adapter inside a hub id's repository."""

    weight: float = 1.0
    """Its share of the combination: 1 for what it was trained to change, less than 0 to subtract it."""

    @model_validator(mode="after")
    def _is_something(self) -> WeightedAdapter:
        if self.weight == 0:
            raise ValueError("a weight of 0 leaves the adapter out: remove it")
        if self.revision is not None and _is_elsewhere(self.path):
            raise ValueError(f"revision is only for a hub id, and path is {self.path}: remove it")
        if self.subfolder is not None and _is_elsewhere(self.path):
            raise ValueError(f"subfolder is only for a hub id: write path: {self.path.rstrip('/')}/{self.subfolder}")
        return self


class LoadSettings(Settings):
    """Where the base model and the adapter come from."""

    base: str
    """A folder, a hub id (`org/name`), a GGUF file (`folder/model.gguf`), or one inside an installed package
    (`pkg:package/file.gguf`). A base that bitsandbytes or GPTQ has quantized is used as what it dequantizes to."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Recorded as the commit that it resolved to."""

    adapter: str | None = None
    """A PEFT adapter: a folder or a hub id. Without one, the base is quantized as it is."""

    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's hub id."""

    adapter_subfolder: Subfolder | None = added()
    """The folder of the adapter inside its hub id's repository, for example `checkpoint-500`. Where only one folder
    holds an adapter, it is found without."""

    adapters: list[WeightedAdapter] = added([])
    """Several LoRA adapters in place of `adapter`, combined as `merge.combination` says."""

    @model_validator(mode="after")
    def _one_adapter_or_several(self) -> LoadSettings:
        if self.adapters and self.adapter is not None:
            raise ValueError("adapter and adapters exclude each other: list all of them in adapters")
        if len(self.adapters) > _MOST_ADAPTERS:
            raise ValueError(f"there are {len(self.adapters)} adapters: at most {_MOST_ADAPTERS} are combined")
        return self

    @model_validator(mode="after")
    def _only_a_hub_id_has_revisions(self) -> LoadSettings:
        if self.revision is not None and _is_elsewhere(self.base):
            raise ValueError(f"revision is only for a hub id, and base is {self.base}: remove it")
        if self.adapter_revision is not None and _is_elsewhere(self.adapter or "/"):
            raise ValueError(f"adapter_revision is only for a hub id, and adapter is {self.adapter}: remove it")
        if self.adapter_subfolder is not None and self.adapter is None:
            raise ValueError("adapter_subfolder is given and adapter is not: remove it")
        if self.adapter_subfolder is not None and _is_elsewhere(self.adapter or ""):
            folder = f"{(self.adapter or '').rstrip('/')}/{self.adapter_subfolder}"
            raise ValueError(f"adapter_subfolder is only for a hub id: write adapter: {folder}")
        return self


def _is_elsewhere(text: str) -> bool:
    return is_explicit_path(text) or text.startswith(PACKAGE_PREFIX) or names_gguf(text)
