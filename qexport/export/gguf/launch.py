"""Files to run the folder: with llama.cpp's server, with Ollama, and from Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qexport.export.model_files import render_launch_files
from qexport.reading.gguf_weights import GGUF_NAME

_PORT: Final = 8080
_MOST_TOKENS: Final = 8192
"""The cache of keys and values of a longer text is left to those who want it."""

_FILES: Final = ("README.md", "llama-server.sh", "Modelfile", "generate.py")


@dataclass(frozen=True)
class GgufLaunch:
    """The values in the launch files.

    Attributes:
        name: of the model in requests.
        longest: the longest text that the file allows, in tokens.
        chat: whether the model has a chat template.
        file: the file with the weights.
        port: of the server.
    """

    name: str
    longest: int
    chat: bool
    file: str = GGUF_NAME
    port: int = _PORT

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer."""
        return min(self.longest, _MOST_TOKENS)


def launch_files(figures: GgufLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    return render_launch_files("qexport.export.gguf", {name: f"{name}.jinja" for name in _FILES}, figures)
