"""What `validate` checks of a folder's weights: their headers against config.json and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.artifact.integrity import Artifact
from qexport.errors import InputError, listed
from qexport.export.gguf.layout import compared_header
from qexport.export.loaders import Folder
from qexport.loading.small_files import read_sidecars
from qexport.reading.gguf_weights import GgufWeights
from qexport.reading.layer_records import refuse_other_layers
from qexport.reading.one_model import refuse_second_model
from qexport.reading.stored_model import StoredModel, open_stored


@dataclass(frozen=True)
class InspectedWeights:
    """The weights of a folder, which are those of its config.json and its manifest.

    Attributes:
        folder: what decides who can load them.
        method: how they are stored.
        unquantized_tensors: the parameters that are not quantized.
        total_bytes: bytes of all tensors.
    """

    folder: Folder
    method: str
    unquantized_tensors: int
    total_bytes: int


def inspect_weights(path: Path, artifact: Artifact | None) -> InspectedWeights:
    """Checks the weights of a folder.

    Args:
        path: the folder of one layout.
        artifact: what its manifest says; None if another tool made the folder.

    Raises:
        InputError: manifest and weights contradict each other, the tensors are not those of the model that config.json
            describes, or some loader would read another model from the folder.
        CompatibilityError: transformers does not know the family.
    """
    with open_stored(path, dtype=torch.float32) as source:
        source.check_complete()
        if artifact is not None:
            _refuse_disagreement(artifact, source)
        refuse_second_model(source)
        _refuse_other_header(source)
        folder = _folder(source, artifact.layout if artifact else None)
        return InspectedWeights(folder, source.method, len(source.specs()) - len(folder.shapes), source.stored_bytes)


def _folder(source: StoredModel, layout: str | None) -> Folder:
    structure = source.architecture.structure
    return Folder(
        source.quantization,
        {module: layer.shape for module, layer in source.layers.items()},
        structure.model_type,
        structure.head,
        layout,
        graph=source.kind == "graph",
        block_sizes={name: each.group_size for name, each in source.layers.items() if each.method in ("nf4", "fp4")},
        gguf_files=len(source.files) if source.kind == "gguf" else 0,
    )


def _refuse_disagreement(artifact: Artifact, source: StoredModel) -> None:
    """What the manifest says of the weights is what the folder stores."""
    manifest = artifact.manifest
    refuse_other_layers(manifest.layers, source)
    config = source.quantization if source.kind == "weights" else manifest.quantization  # a graph has none
    if (manifest.quantization, manifest.sizes.total_bytes) != (config, source.stored_bytes):
        raise InputError(
            "the manifest's quantization or total_bytes are not those of the weights",
            where=str(artifact.path),
            mend="fetch the artifact again",
        )


def _refuse_other_header(source: StoredModel) -> None:
    """What a GGUF file says of model and tokenizer is what the files beside it say."""
    if not isinstance(source, GgufWeights):
        return
    if found := compared_header(source.file, source.architecture, read_sidecars(source.folder)):
        raise InputError(
            "the file's header contradicts config.json or the tokenizer's files, and llama.cpp reads the header",
            where=f"{source.file.path}: {listed(found)}",
            mend="fetch the artifact again",
        )
