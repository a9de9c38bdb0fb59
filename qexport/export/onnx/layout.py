"""The onnx layout: a folder that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch

from qexport.architectures.structure import Structure
from qexport.artifact.manifest import GraphRecord
from qexport.errors import CompatibilityError, QexportError, listed
from qexport.export.encodings import OnnxInitializers
from qexport.export.model_files import write_model_files
from qexport.export.onnx.files import OnnxFiles, onnx_files, shared_names
from qexport.export.onnx.lowering import lower
from qexport.export.onnx.tracing import MINIMUM_RUNTIME, Trace, trace
from qexport.export.onnx.weights import DTYPES, Place, put_in_place
from qexport.export.quantization_config import quantization_config
from qexport.export.settings import OnnxSettings
from qexport.export.size import parse_size
from qexport.export.written_weights import link_or_copy
from qexport.reading.onnx.graph import GRAPH_NAME, Graph
from qexport.tensors import W8A8, Checkpoint, Outputs
from qexport.tensors.safetensors_file import SafetensorsFile

_SHARED_FROM: Final = "safetensors"


class OnnxLayout:
    """One graph for prefill and decoding, and its weights beside it.

    Args:
        settings: the recipe's.
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model.

    Raises:
        CompatibilityError: a layer cannot be stored, or the family cannot be traced.
    """

    name = "onnx"
    readers = ("onnxruntime",)

    def __init__(self, settings: OnnxSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._settings, self._outputs, self._structure, self._checkpoint = settings, outputs, structure, checkpoint
        self._activations: torch.dtype = getattr(torch, settings.activations)
        self._encoding = OnnxInitializers(self._activations, isinstance(outputs.method, W8A8))
        size = parse_size(settings.max_shard_size)
        self.weights: OnnxFiles = onnx_files(outputs, self._encoding, size, shared=settings.share_weights)
        self._refuse_what_cannot_be()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the codes came about. config.json does not say it: who reads that would look for other tensors."""
        return quantization_config(self._outputs, self._structure)

    @property
    def notes(self) -> list[str]:
        """What a user of this folder should know."""
        notes = ["position_ids count each row's tokens without its padding, which is on the left"]
        if self._settings.attention == "fused":
            notes.append("fused attention takes several new tokens with a past for a batch of one only")
        if self._settings.accuracy_level == 4:
            notes.append("accuracy_level 4: ONNX Runtime rounds the inputs of quantized layers to 8 bits")
        return notes

    @property
    def graph(self) -> GraphRecord:
        """What the manifest says of the graph."""
        graph, settings = self._lowered, self._settings
        return GraphRecord(
            ir_version=graph.ir_version,
            opsets=dict(graph.graph.opset_imports),
            minimum_onnxruntime=MINIMUM_RUNTIME,
            activations=settings.activations,
            attention=settings.attention,
            accuracy_level=settings.accuracy_level,
        )

    def prepare(self) -> None:
        """Traces the graph. After hours of quantizing it would be too late to learn that it cannot be.

        Raises:
            CompatibilityError: the family cannot be traced.
        """
        assert self._lowered is not None

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes the graph, and what lies beside it.

        Raises:
            QexportError: a file of the checkpoint would leave the folder or replace another file.
        """
        embedding = f"{self._structure.embedding}.weight"
        write_model_files(
            folder, checkpoint, self._outputs.method, None, self._outputs.dense_dtype(embedding), self.notes
        )
        put_in_place(self._lowered.graph, {**self.weights.places, **self._share(folder)})
        ir.save(self._lowered, folder / GRAPH_NAME)

    def check(self, folder: Path) -> None:
        """Holds the folder against ONNX's own checker and our reader: every weight lies inside the folder.

        Raises:
            QexportError: it is no valid graph.
        """
        try:
            onnx.checker.check_model(_without_data(folder / GRAPH_NAME))
        except onnx.checker.ValidationError as error:
            raise QexportError(f"onnx.checker refuses the graph: {error}", where=GRAPH_NAME) from error
        unplaced = self._specs.keys() - Graph(folder).initializers.keys()
        if unplaced:
            raise QexportError("weights are not in the graph", where=listed(sorted(unplaced)))

    @cached_property
    def _lowered(self) -> ir.Model:
        return lower(
            self._trace,
            self._outputs,
            self._specs,
            activations=self._activations,
            attention=self._settings.attention,
            accuracy_level=self._settings.accuracy_level,
        )

    @cached_property
    def _trace(self) -> Trace:
        return trace(self._checkpoint.config, self._activations)

    @property
    def _specs(self) -> dict[str, Any]:
        """Every initializer, shared ones too."""
        outputs = self._outputs.specs.items()
        return {part: found for name, spec in outputs for part, found in self._encoding.specs(name, spec).items()}

    def _share(self, folder: Path) -> dict[str, Place]:
        """Links the files of the safetensors layout into the folder, and finds the shared tensors in them.

        They get other names, since config.json says nothing of codes: a loader that finds `model.safetensors` beside it
        would take them for weights.
        """
        places: dict[str, Place] = {}
        if not self._settings.share_weights:
            return places
        wanted = shared_names(self._outputs)
        for source in sorted((folder.parent / _SHARED_FROM).glob("*.safetensors")):
            target = folder / source.name.replace("model", "shared", 1)
            link_or_copy(source, target)
            with SafetensorsFile(target) as file:
                offsets, specs = file.offsets(), self._specs
            places |= {name: Place(target.name, offsets[name], specs[name]) for name in wanted & offsets.keys()}
        return places

    def _refuse_what_cannot_be(self) -> None:
        self.weights.refuse_faults()
        if any(linear.expert for linear in self._structure.block_linears):
            raise CompatibilityError(
                "the onnx layout does not know mixtures of experts",
                where="export: onnx",
                mend="leave this layout out; safetensors, tgi and vllm take them",
            )
        dtypes = {spec.dtype for spec in self._specs.values()} - DTYPES.keys()
        if dtypes:
            raise CompatibilityError(f"the onnx layout cannot hold {sorted(map(str, dtypes))}", where="export: onnx")


def _without_data(path: Path) -> onnx.ModelProto:
    """The graph with inputs in place of what lies in other files. Our own reader looks at those: the checker refuses
    files that have a second hard link, as shared ones do.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in outside:
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model
