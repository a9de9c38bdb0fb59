"""Where a base model and its adapter come from: the recipe's `load`."""

from __future__ import annotations

from pydantic import model_validator

from qexport.references import PACKAGE_PREFIX, is_explicit_path, names_gguf
from qexport.settings import Settings


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

    @model_validator(mode="after")
    def _only_a_hub_id_has_revisions(self) -> LoadSettings:
        if self.revision is not None and _is_elsewhere(self.base):
            raise ValueError(f"revision is only for a hub id, and base is {self.base}: remove it")
        if self.adapter_revision is not None and _is_elsewhere(self.adapter or "/"):
            raise ValueError(f"adapter_revision is only for a hub id, and adapter is {self.adapter}: remove it")
        return self


def _is_elsewhere(text: str) -> bool:
    return is_explicit_path(text) or text.startswith(PACKAGE_PREFIX) or names_gguf(text)
