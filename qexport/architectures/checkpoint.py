"""A model as it was found: architecture, weights, and the files that travel with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexport.architectures.architecture import Architecture
from qexport.tensors.checkpoint import Origin
from qexport.tensors.source import WeightSource


@dataclass(frozen=True)
class Checkpoint:
    """A base model, or a base model with its adapter merged.

    Attributes:
        architecture: that of its config.json, which is without the keys that would load code.
        weights: the tensors, named as in the checkpoint's files.
        files: tokenizer, chat template and generation config by file name, byte for byte.
        origin: where it came from.
    """

    architecture: Architecture
    weights: WeightSource
    files: Mapping[str, bytes]
    origin: Origin

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.architecture.config
