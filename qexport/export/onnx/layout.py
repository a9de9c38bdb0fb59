"""The onnx layout: a folder that ONNX Runtime runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch

from qexport.amounts import parse_size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import CardText, GraphRecord
from qexport.errors import CompatibilityError, InputError, QexportError, listed
from qexport.export import OnnxSettings
from qexport.export.loaders import Folder, loading_section
from qexport.export.model_files import card_text, model_files, sizes_of, write_files
from qexport.export.onnx.attention import refuse_unfused
from qexport.export.onnx.chat import ChatTurn, chat_turn
from qexport.export.onnx.files import DTYPES, OnnxFiles, Place, onnx_files, put_in_place
from qexport.export.onnx.genai import FILE_NAME, genai_config, genai_notes, generation
from qexport.export.onnx.interception import switching_length
from qexport.export.onnx.launch import OnnxLaunch, launch_files
from qexport.export.onnx.lowering import lower
from qexport.export.onnx.tracing import MINIMUM_RUNTIME, NARROW_2_BIT_RUNTIME, layer_caches, trace
from qexport.export.onnx.triton import triton_inputs, triton_outputs
from qexport.export.rounded_ends import rounded_ends, rounding_note
from qexport.export.tensor_writer import link_or_copy
from qexport.formats import Outputs, W8A8Format
from qexport.formats.onnx import OnnxFormat
from qexport.formats.onnx.nibbles import LOW
from qexport.reading.onnx.graph import GRAPH_NAME, Graph, read_graph
from qexport.reading.onnx.session import refuse_unloadable
from qexport.tensors import Float4QuantizedSpec, Float8QuantizedSpec, GroupQuantizedSpec
from qexport.tensors.safetensors_file import SafetensorsFile

_SHARED_FROM: Final = "safetensors"

_LOW_CODES: Final = f".qweight_{LOW}"
_GRAPH_BYTES: Final = 6000
_BLOCK_BYTES: Final = 4700
_INITIALIZER_BYTES: Final = 110
_PAIR_BYTES: Final = 400
"""Measured on tiny models of several families; a pair is one of 4-bit nodes. The places of the graph's own names count
with the initializers'."""


class OnnxLayout:
    """One graph for prefill and decoding, and its weights beside it.

    Args:
        settings: from the recipe.
        outputs: what the pass will yield.
        structure: of the model.
        checkpoint: the merged model.

    Raises:
        CompatibilityError: a layer cannot be stored, or the layout does not support the model.
    """

    name = "onnx"
    launch: OnnxLaunch | None = None
    """Known when the files are written, since it names those of the weights."""

    readers = ("onnxruntime",)
    degrees: Mapping[str, Sequence[int]] = {}

    def __init__(self, settings: OnnxSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._settings, self._outputs, self._structure, self._checkpoint = settings, outputs, structure, checkpoint
        self._activations: torch.dtype = getattr(torch, settings.activations)
        self._refuse_method()
        int8_activations = isinstance(outputs.format, W8A8Format)
        rounded = rounded_ends(settings, outputs, structure)
        looked_up = frozenset() if structure.tied else rounded - {f"{structure.head}.weight"}
        self._encoding = OnnxFormat(self._activations, int8_activations, settings.accuracy_level, rounded, looked_up)
        size = parse_size(settings.max_shard_size)
        self.weights: OnnxFiles = onnx_files(outputs, self._encoding, size, shared=settings.share_weights)
        self._refuse_unsupported()
        self._cache = layer_caches(checkpoint.architecture, self._activations)
        if settings.attention == "fused":
            refuse_unfused(self._cache)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the codes were made. It is not in config.json, since loaders would look for other tensors."""
        return self._outputs.format.quantization_config(self._outputs.specs, self._structure)

    @property
    def notes(self) -> list[str]:
        """What users of this folder should know."""
        notes = ["position_ids count each row's tokens without its padding, which is on the left"]
        if self._settings.attention == "fused":
            notes.append("fused attention takes several new tokens with a past for a batch of one only")
        if self._settings.accuracy_level == 4:
            notes.append("accuracy_level 4: ONNX Runtime rounds the inputs of quantized layers to 8 bits")
        notes += rounding_note(self._encoding.rounded)
        if length := switching_length(self._checkpoint.architecture.parsed):
            notes.append(f"a text that grows past {length} tokens must begin anew there, without a cache: LongRoPE")
        if self._chat[1]:
            notes.append(f"launch/generate.py continues texts without the chat template: {self._chat[1]}")
        notes += genai_notes(self._checkpoint.config, self._cache)
        if self._shared:
            notes.append("onnx.load refuses data files that have a second link, ONNX Runtime does not; a copy has none")
        return notes

    @property
    def graph(self) -> GraphRecord:
        """The manifest's record of the graph."""
        graph, settings = self._lowered, self._settings
        return GraphRecord(
            ir_version=graph.ir_version,
            opsets=dict(graph.graph.opset_imports),
            minimum_onnxruntime=self._minimum_runtime,
            activations=settings.activations,
            attention=settings.attention,
            accuracy_level=settings.accuracy_level,
        )

    @property
    def _minimum_runtime(self) -> str:
        """The oldest ONNX Runtime. 2-bit codes with float16 inputs need a later one."""
        narrow = self._activations == torch.float16
        quantized = self._outputs.quantized.values()
        coarse = any(isinstance(spec, GroupQuantizedSpec) and spec.bits == 2 for spec in quantized)
        return NARROW_2_BIT_RUNTIME if narrow and coarse else MINIMUM_RUNTIME

    def prepare(self) -> None:
        """Traces the graph, so that a family that cannot be traced fails before hours of quantizing.

        Raises:
            CompatibilityError: the family cannot be traced.
        """
        assert self._lowered is not None

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """See `Layout.files`. Links to the files of another layout are left out, since they take no space."""
        data = self.weights.files
        return {**data, GRAPH_NAME: self._graph_bytes, **sizes_of(self._files(checkpoint, data))}

    @property
    def _graph_bytes(self) -> int:
        """An estimate: nodes and initializers have names, and each initializer has its place in the data files."""
        names = sum(map(len, self.weights.initializers))
        blocks, initializers = len(self._structure.blocks), len(self.weights.initializers)
        pairs = sum(name.endswith(_LOW_CODES) for name in self.weights.initializers)
        graph = _GRAPH_BYTES + blocks * _BLOCK_BYTES + pairs * _PAIR_BYTES
        return graph + initializers * _INITIALIZER_BYTES + 2 * names

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes the graph and the files beside it."""
        places = {**self.weights.places, **self._share(folder)}
        put_in_place(self._lowered.graph, places)
        ir.save(self._lowered, folder / GRAPH_NAME)
        write_files(folder, self._files(checkpoint, {place.file for place in places.values()}))

    def _files(self, checkpoint: Checkpoint, data_files: Iterable[str]) -> dict[str, bytes]:
        """All files except the weights, the graph, the manifest and the model card."""
        beside = self._runtime_files(checkpoint, sorted(data_files))
        files = replace(checkpoint, files={**checkpoint.files, **beside})
        dtype = self._outputs.unquantized_dtype(f"{self._structure.embedding}.weight")
        return model_files(files, None, dtype)

    @property
    def card(self) -> CardText:
        """The format, the programs that open the graph, and what they do with it."""
        return card_text(self._outputs.format, self.notes, loading_section(self._folder))

    @property
    def _folder(self) -> Folder:
        shapes = {module: spec.shape for module, spec in self._outputs.quantized.items()}
        return Folder(None, shapes, self._structure.model_type, self._structure.head, self.name, graph=True)

    def _runtime_files(self, checkpoint: Checkpoint, data_files: Sequence[str]) -> dict[str, bytes]:
        """Files to run the graph: launch files, and genai_config.json if onnxruntime-genai runs the family."""
        ends = generation(checkpoint)
        self.launch = OnnxLaunch(
            name=checkpoint.name,
            triton_image=self._settings.triton_image,
            inputs=triton_inputs(self._cache),
            outputs=triton_outputs(self._cache, self._activations, self._structure.vocab_size),
            data_files=list(data_files),
            ends=list(ends.ends),
            tokenizer="tokenizer.json" in checkpoint.files,
            chat=self._chat[0],
            appends=self._appends or None,
        )
        config = genai_config(checkpoint.config, self._cache, ends)
        own = {FILE_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("ascii")} if config else {}
        return launch_files(self.launch) | own

    def check(self, folder: Path) -> None:
        """Checks the graph with our own reader, which requires every weight to be in the folder, and then with ONNX's
        checker and ONNX Runtime (types and kernels).

        Raises:
            QexportError: the graph is not valid.
        """
        unplaced = self.weights.initializers.keys() - Graph(folder).initializers.keys()
        if unplaced:
            raise QexportError("weights are missing in the graph", where=listed(sorted(unplaced)))
        try:
            onnx.checker.check_model(_with_weights_as_inputs(read_graph(folder / GRAPH_NAME)))
        except onnx.checker.ValidationError as error:
            raise QexportError(f"onnx.checker refuses the graph: {error}", where=GRAPH_NAME) from error
        refuse_unloadable(folder)

    @property
    def _shared(self) -> bool:
        return self._settings.share_weights

    @property
    def _appends(self) -> bool:
        """Whether keys and values may lie in a buffer with room: only fused attention appends, and only to these."""
        return self._settings.attention == "fused" and all(each.grows for layer in self._cache for each in layer)

    @cached_property
    def _chat(self) -> tuple[ChatTurn | None, str]:
        """What the script writes around a message, or why it cannot."""
        try:
            return chat_turn(self._checkpoint.files), ""
        except InputError as error:
            return None, error.what

    @cached_property
    def _lowered(self) -> ir.Model:
        return lower(
            trace(self._checkpoint.architecture, self._activations),
            self._outputs,
            self.weights.initializers,
            encoding=self._encoding,
            attention=self._settings.attention,
        )

    def _share(self, folder: Path) -> dict[str, Place]:
        """Links the files of the safetensors layout that have shared tensors into the folder.

        The links get other names, since config.json does not mention codes: a loader that finds `model.safetensors`
        beside it would take them for weights.

        Returns:
            The place of each shared tensor.
        """
        places: dict[str, Place] = {}
        if not self._shared:
            return places
        wanted, specs = self.weights.shared, self.weights.initializers
        for source in sorted((folder.parent / _SHARED_FROM).glob("*.safetensors")):
            with SafetensorsFile(source) as file:
                offsets = {name: offset for name, offset in file.offsets().items() if name in wanted}
            if offsets:
                target = folder / source.name.replace("model", "shared", 1)
                link_or_copy(source, target)
                places |= {name: Place(target.name, offset, specs[name]) for name, offset in offsets.items()}
        return places

    def _refuse_method(self) -> None:
        if any(isinstance(spec, Float8QuantizedSpec) for spec in self._outputs.quantized.values()):
            raise CompatibilityError(
                "the layout onnx stores no FP8: ONNX Runtime has no operator that multiplies with such weights on CPUs",
                where="export: onnx",
                mend="quantize with w8a8 or int8 for 8 bits, or leave this layout out",
            )
        if any(isinstance(spec, Float4QuantizedSpec) for spec in self._outputs.quantized.values()):
            raise CompatibilityError(
                f"the layout onnx stores no {self._outputs.format.card.title}: ONNX Runtime has no operator that "
                "multiplies with such weights on CPUs",
                where="export: onnx",
                mend="quantize with gptq, awq or nf4 for 4 bits, or leave this layout out",
            )

    def _refuse_unsupported(self) -> None:
        self.weights.refuse_faults()
        if any(linear.expert for linear in self._structure.block_linears):
            raise CompatibilityError(
                "the onnx layout does not know mixtures of experts",
                where="export: onnx",
                mend="leave this layout out; safetensors, tgi and vllm support them",
            )
        dtypes = {spec.dtype for spec in self.weights.initializers.values()} - DTYPES.keys()
        if dtypes:
            raise CompatibilityError(f"the onnx layout cannot store {sorted(map(str, dtypes))}", where="export: onnx")


def _with_weights_as_inputs(graph: bytes) -> bytes:
    """A graph whose weights in other files are inputs of their names, types and shapes.

    The checker would look for the files itself: it refuses those with a second hard link, and calls a graph that it
    cannot read from the disk malformed. The places of the weights are checked by our own reader.
    """
    model = onnx.load_model_from_string(graph)
    for tensor in [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    checked: bytes = model.SerializeToString()
    return checked
