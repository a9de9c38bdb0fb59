"""The recipe's `load`."""

from __future__ import annotations

from qexport.settings import Settings


class LoadSettings(Settings):
    """Where the base model and the adapter come from."""

    base: str
    """A folder, a hub id (`org/name`), or `pkg:package/file.gguf`: a GGUF file inside an installed package."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Recorded as the commit that it resolved to."""

    adapter: str | None = None
    """A PEFT adapter: a folder or a hub id. Without one, the base is quantized as it is."""

    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's hub id."""
