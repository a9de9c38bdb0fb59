"""The base model as adapters name its parts: module paths, their kinds, and the tensors they hold."""

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
        """Whether the weight is stored with its outputs last."""
        return self.kind in ("conv1d", "embedding")

    @property
    def inputs(self) -> int:
        """The number of inputs; for an embedding, of tokens."""
        return self.tensors["weight"][0 if self.transposed else 1]

    @property
    def outputs(self) -> int:
        """The number of outputs; for an embedding, of dimensions."""
        return self.tensors["weight"][1 if self.transposed else 0]

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias."""
        return "bias" in self.tensors


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter is merged into.

    Attributes:
        structure: the family, and whether embedding and head are tied; it names tensors as the files do.
        modules: every module below the root, by path, in the order of PEFT; after them the matrices of experts, by
            their names in the files, which were the modules' names up to transformers 4.
        embedding: the path of the input embedding.
        head: the path of the output head.
        naming: the names of the modules' tensors in the checkpoint's files.
        weights: the checkpoint's tensors, as their headers say.
    """

    structure: Structure
    modules: Mapping[str, Module]
    embedding: str
    head: str
    naming: Naming
    weights: Mapping[str, TensorSpec]


def describe_base(checkpoint: Checkpoint) -> BaseModel:
    """The modules of a checkpoint's architecture, and its tensors."""
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
