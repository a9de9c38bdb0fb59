"""Checkpoints of the model inside a causal language model, whose names lack its prefix: the hub's `gpt2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from qexport.architectures.naming import name_parameters
from qexport.loading.model_weights import ChunkedSource
from qexport.tensors.source import TensorSpec


def with_prefix(source: ChunkedSource, model: PreTrainedModel) -> ChunkedSource:
    """The source under the names of the whole model, which transformers takes such a checkpoint for.

    Left as it is where any name has the prefix, or none is known with it.
    """
    known, prefix = name_parameters(model).parts, f"{model.base_model_prefix}."
    names = list(source.specs())
    inside = {name for name in names if name not in known and f"{prefix}{name}" in known}
    if not inside or any(name.startswith(prefix) for name in names):
        return source
    return _Prefixed(source, {f"{prefix}{name}" if name in inside else name: name for name in names})


class _Prefixed:
    """A source under other names."""

    def __init__(self, source: ChunkedSource, stored: Mapping[str, str]) -> None:
        self._source, self._stored = source, stored

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape and dtype, in the source's order."""
        found = self._source.specs()
        return {name: found[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own."""
        return self._source.read(self._stored[name])

    def place(self, name: str) -> str:
        """The tensor's file and its name there."""
        return self._source.place(self._stored[name])

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of a fixed size."""
        return self._source.chunks(self._stored[name])
