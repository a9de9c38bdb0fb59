"""One side of a comparison: the parameters of a folder or a file, read one at a time, and the bytes that store them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.artifact.names import gguf_of
from qexport.describing.adapters import ADAPTER_CONFIG
from qexport.describing.tensors import ADAPTER_WEIGHTS
from qexport.errors import CompatibilityError, InputError
from qexport.loading.gguf_checkpoint import read_gguf
from qexport.progress import silent
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.reading.stored_model import open_stored
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.safetensors_folder import SafetensorsFolder

_GRAPH: Final = "model.onnx"


class Stored(Protocol):
    """The tensors of safetensors files, by name."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape and dtype."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor."""
        ...

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of a fixed size."""
        ...


class Values(Protocol):
    """Parameters by name, dequantized to float32 where they are codes."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A copy of the parameter."""
        ...


@dataclass(frozen=True)
class Side:
    """What is compared.

    Attributes:
        parameters: by name.
        stored: the tensors in safetensors files; None for a GGUF file or a graph.
        parts: the stored tensors of each parameter that is not stored under its own name.
        notes: what is not compared, and why.
        checkpoint: for a GGUF file, whose config and tokenizer are not files.
        weights: the files of a folder all of whose content is in the parameters. Graphs and GGUF files hold more.
    """

    parameters: Values
    stored: Stored | None = None
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    weights: frozenset[str] = frozenset()

    def places(self, name: str) -> tuple[str, ...]:
        """The stored tensors of a parameter."""
        return self.parts.get(name, (name,))


@contextmanager
def open_side(path: Path) -> Iterator[Side]:
    """Opens a folder of a model or an adapter, a GGUF file or a safetensors file.

    Raises:
        InputError: it is none of these, or malformed.
        CompatibilityError: it is a GGUF file of an architecture that is not supported.
    """
    with ExitStack() as stack:
        if path.is_file() and path.suffix == ".gguf":
            checkpoint = read_gguf(path, kind="file", name=path.name, progress=silent)
            yield Side(checkpoint.weights, checkpoint=checkpoint)
        elif path.is_file():
            single = stack.enter_context(SafetensorsFile(path))
            yield Side(single, single)
        elif (path / ADAPTER_CONFIG).is_file():
            single = stack.enter_context(SafetensorsFile(path / ADAPTER_WEIGHTS))
            yield Side(single, single, weights=frozenset({ADAPTER_WEIGHTS}))
        elif gguf_of(path) is not None or (path / _GRAPH).is_file():
            yield Side(stack.enter_context(open_stored(path, dtype=torch.float32)))
        else:
            yield _folder(path, stack)


def _folder(path: Path, stack: ExitStack) -> Side:
    stored = stack.enter_context(SafetensorsFolder(path))
    try:
        model = stack.enter_context(SafetensorsWeights(path, dtype=torch.float32))
    except (InputError, CompatibilityError) as error:
        note = f"its codes are compared as they are stored: {error.what}"
        return Side(stored, stored, notes=(note,), weights=frozenset(stored.shards))
    parts = {
        f"{module}.weight": tuple(f"{module}.{part}" for part in weight.parts)
        for module, weight in model.quantized.items()
    }
    return Side(model, stored, parts, weights=frozenset(stored.shards))
