"""Files to run the folder: with llama.cpp's server, with Ollama, and from Python."""

from __future__ import annotations

from typing import ClassVar, Final

from qexport.artifact.names import GGUF_NAME
from qexport.export.launch import Launch, render_launch_files

_MOST_TOKENS: Final = 8192
"""The cache of keys and values of a longer text is left to those who want it."""

_FILES: Final = ("README.md", "llama-server.sh", "Modelfile", "generate.py")


class GgufLaunch(Launch):
    """The values in the launch files."""

    file: ClassVar[str] = GGUF_NAME
    port: ClassVar[int] = 8080

    longest: int
    """The longest text that the file allows, in tokens."""

    chat: bool
    """Whether the model has a chat template."""

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer."""
        return min(self.longest, _MOST_TOKENS)


def launch_files(figures: GgufLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    return render_launch_files("qexport.export.gguf", {name: f"{name}.jinja" for name in _FILES}, figures)
