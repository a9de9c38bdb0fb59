"""The base model as an adapter sees it: module paths, their kinds, and the tensors they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.naming import Naming
from qexport.architectures.structure import Structure
from qexport.tensors.source import TensorSpec

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Module:
    """One module of the base.

    Attributes:
        kind: `linear` stores [out, in], `conv1d` (GPT-2's) [in, out], `embedding` [tokens, dimensions].
        tensors: its parameters and persistent buffers and those inside it, by their path within the module.
    """

    kind: Kind
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def transposed(self) -> bool:
        """The weight is stored with its outputs last."""
        return self.kind in ("conv1d", "embedding")

    @property
    def inputs(self) -> int:
        """How many inputs: for an embedding, tokens."""
        return self.tensors["weight"][0 if self.transposed else 1]

    @property
    def outputs(self) -> int:
        """How many outputs: for an embedding, dimensions."""
        return self.tensors["weight"][1 if self.transposed else 0]

    @property
    def has_bias(self) -> bool:
        """A bias of its own."""
        return "bias" in self.tensors


@dataclass(frozen=True)
class BaseModel:
    """What an adapter is laid over.

    Attributes:
        structure: the family, and whether embedding and head are tied; it names tensors as the files do.
        modules: every module below the root, by path, in the order that PEFT walks them; after them the matrices of
            experts, by their names in the files, which were the modules' names up to transformers 4.
        embedding: the path of the input embedding.
        head: the path of the output head.
        naming: what the modules' tensors are called in the checkpoint's files.
        weights: the checkpoint's tensors, as their headers say.
    """

    structure: Structure
    modules: Mapping[str, Module]
    embedding: str
    head: str
    naming: Naming
    weights: Mapping[str, TensorSpec]


def look_at(checkpoint: Checkpoint) -> BaseModel:
    """The modules of a checkpoint's architecture, and its tensors.

    Raises:
        CompatibilityError: transformers does not know the family.
    """
    architecture = checkpoint.architecture
    model, naming = architecture.skeleton, architecture.naming
    modules = {
        path: Module(_kind(module), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
        for path, module in model.named_modules()
        if path
    }
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]
    weights = checkpoint.weights.specs()
    experts = {
        name.removesuffix(".weight"): Module("linear", {"weight": part.shape})
        for name, part in naming.parts.items()
        if part.expert is not None and name.endswith(".weight")
    }
    return BaseModel(architecture.structure, modules | experts, embedding, head, naming, weights)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"
