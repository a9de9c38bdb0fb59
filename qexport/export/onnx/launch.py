"""Files to run a graph: a script that needs only ONNX Runtime, and a Triton repository."""

from __future__ import annotations

from qexport.export.launch import Launch, render_launch_files
from qexport.export.onnx.chat import ChatTurn
from qexport.records import Record, added


class TritonValue(Record):
    """One input or output of the graph in config.pbtxt."""

    name: str
    """In the graph."""

    type: str
    """Triton's name for the dtype."""

    dims: list[int]
    """Its sizes; -1 for one that is free."""


class OnnxLaunch(Launch):
    """The values in the launch files."""

    triton_image: str
    """Triton's container image."""

    inputs: list[TritonValue]
    """Of the graph, in its order; the next field too."""

    outputs: list[TritonValue]

    data_files: list[str]
    """The files with the weights, as model.onnx names them."""

    ends: list[int]
    """The tokens that end a text."""

    tokenizer: bool
    """Whether the folder has a tokenizer.json, which the script needs."""

    chat: ChatTurn | None = added()
    """What the script writes around a message; None where it only continues texts."""

    appends: bool | None = added()
    """Whether the graph appends to the memory of its past, if that has room; None where it does not."""


def launch_files(figures: OnnxLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    triton = f"triton/{figures.label}"
    templates = {
        "README.md": "README.md.jinja",
        f"{triton}/config.pbtxt": "config.pbtxt.jinja",
        f"{triton}/1/README.md": "place.md.jinja",
    }
    if figures.tokenizer:
        templates["generate.py"] = "generate.py.jinja"
    return render_launch_files("qexport.export.onnx", templates, figures)
