"""Files to run the folder: with llama.cpp's server, with Ollama, and from Python."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from qexport.artifact.names import gguf_names
from qexport.export.launch import Launch, render_launch_files
from qexport.records import added

_MOST_TOKENS: Final = 8192
"""The cache of keys and values of a longer text is left to those who want it."""

_FILES: Final = ("README.md", "llama-server.sh", "generate.py")
_MODELFILE: Final = "Modelfile"
"""Of Ollama, which takes one file."""


class GgufLaunch(Launch):
    """The values in the launch files."""

    port: ClassVar[int] = 8080

    longest: int
    """The longest text that the file allows, in tokens."""

    chat: bool
    """Whether the model has a chat template."""

    parts: Annotated[int, Field(ge=1)] = added(1)
    """The files that hold the model."""

    @property
    def file(self) -> str:
        """The file that programs are given, of several the first."""
        return gguf_names(self.parts)[0]

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer."""
        return min(self.longest, _MOST_TOKENS)


def launch_files(figures: GgufLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    names = [*_FILES, *([_MODELFILE] if figures.parts == 1 else [])]
    return render_launch_files("qexport.export.gguf", {name: f"{name}.jinja" for name in names}, figures)
