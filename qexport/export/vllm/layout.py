"""The vllm layout: a folder that vLLM serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from qexport.amounts import parse_size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import CardText
from qexport.export import VllmSettings
from qexport.export.model_files import card_text, model_files, sizes_of, write_files
from qexport.export.vllm.families import SplitLinear, degrees
from qexport.export.vllm.launch import VllmLaunch, launch_files, max_model_len
from qexport.export.vllm.rules import VLLM
from qexport.export.vllm.served import ServedByVllm
from qexport.export.weight_files import WeightFiles
from qexport.formats import AwqFormat, BlockFp8Format, Float4Format, FloatQuantizedFormat, GptqFormat, Outputs
from qexport.formats.compressed_tensors import PackQuantizedFormat
from qexport.formats.format import StoredFormat
from qexport.tensors import Float8QuantizedSpec, GroupQuantizedSpec
from qexport.tensors.float4 import Float4Kind

_BFLOAT16: Final = (
    "it computes in bfloat16, as the model was trained, which rounds the scales by at most 0.4%; --dtype float16 reads "
    "them as they are, but activations above 65504 overflow in it: measure it first (verify.through)"
)
"""Why the launch files do not take the dtype that reads the scales exactly."""

_FP8_NOTES: Final = (
    "FP8 products need compute capability 8.9 on NVIDIA GPUs; from 7.5 on Marlin multiplies FP8 weights with 16-bit "
    "activations",
)
_BLOCK_FP8_NOTES: Final = (
    *_FP8_NOTES,
    "vLLM on CPUs needs AMX for blocks of FP8, and multiplies them with 16-bit activations",
)

_FP4_CAPABILITIES: Final[Mapping[Float4Kind, str]] = {"nvfp4": "7.5", "mxfp4": "8.0"}
"""From `compressed_tensors/schemes`, `get_min_capability`."""

_MXFP4_ACTIVATIONS: Final = (
    "from compute capability 10.0 on, with FlashInfer, vLLM rounds the inputs of MXFP4 layers too, though config.json "
    "asks for 16 bits; VLLM_DISABLED_KERNELS=FlashInferMxFp4LinearKernel keeps them as verification has them"
)

_CPU_MULTIPLE: Final = 32
"""From `vllm/model_executor/kernels/linear/mixed_precision/cpu.py`."""


class VllmLayout:
    """The weights that vLLM reads, configs with the keys that it reads, and `launch/`.

    Args:
        settings: from the recipe.
        outputs: what the pass will yield.
        structure: of the model.
        checkpoint: the merged model, of which only config and file names are read.

    Raises:
        CompatibilityError: the artifact would break a rule of vLLM, or a layer cannot be stored.
    """

    name = "vllm"
    graph = None
    readers = ("vLLM 0.32",)

    def __init__(self, settings: VllmSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._outputs, self._structure, self._config = outputs, structure, checkpoint.config
        self._settings, self._name = settings, checkpoint.name
        self.weights = WeightFiles(self._stored_as, outputs, parse_size(settings.max_shard_size))
        planned = ServedByVllm.planned(self._files(checkpoint), self.weights.specs)
        VLLM.refuse_plan(replace(planned, plan=structure))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` for config.json."""
        return self._stored_as.quantization_config(self._outputs.specs, self._structure)

    @property
    def notes(self) -> list[str]:
        """What the server does with the folder."""
        notes = _kernel_notes(self._outputs)
        if isinstance(self._outputs.format, GptqFormat | AwqFormat) and self._unquantized_dtype == torch.bfloat16:
            notes.append(_BFLOAT16)
        if self._rounded_by_amx:
            notes.append("on CPUs with AMX, bfloat16 wants VLLM_CPU_INT4_W4A8=0, as in launch/vllm-serve.sh")
        working = ", ".join(map(str, self._degrees))
        return [*notes, f"numbers of GPUs that work (--tensor-parallel-size): {working}"]

    @property
    def degrees(self) -> Mapping[str, Sequence[int]]:
        """See `Layout.degrees`."""
        return {self.readers[0]: self._degrees}

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """See `Layout.files`."""
        return {**self.weights.files, **sizes_of(self._files(checkpoint))}

    @property
    def card(self) -> CardText:
        """The format, and what the server does with the folder."""
        return card_text(self._outputs.format, self.notes)

    @property
    def launch(self) -> VllmLaunch:
        """What the launch files say."""
        return VllmLaunch(
            name=self._name,
            image=self._settings.image,
            triton_image=self._settings.triton_image,
            max_model_len=max_model_len(self._config),
            dtype=str(self._unquantized_dtype).removeprefix("torch."),
            degrees=self._degrees,
            rounded_by_amx=self._rounded_by_amx,
        )

    def prepare(self) -> None:
        """Does nothing: the constructor has checked everything that needs no weights."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config, tokenizer and launch files."""
        write_files(folder, self._files(checkpoint))

    def check(self, folder: Path) -> None:
        """Checks the finished folder against every rule of vLLM's configuration and loaders."""
        VLLM.refuse_folder(folder)

    def _files(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """All files except the weights, the manifest and the model card."""
        served = replace(checkpoint, files={**checkpoint.files, **launch_files(self.launch)})
        return model_files(served, self.quantization, self._unquantized_dtype)

    @property
    def _stored_as(self) -> StoredFormat:
        """The same format as in the safetensors layout, unless the recipe names another one for GPTQ codes."""
        packed = isinstance(self._outputs.format, GptqFormat) and self._settings.format == "compressed-tensors"
        return PackQuantizedFormat() if packed else self._outputs.format

    @property
    def _unquantized_dtype(self) -> torch.dtype:
        return self._outputs.unquantized_dtype(f"{self._structure.embedding}.weight")

    @property
    def _rounded_by_amx(self) -> bool:
        """See `CPUWNA16LinearKernel` in `vllm/model_executor/kernels/linear/mixed_precision/cpu.py` (0.32)."""
        codes = [spec for spec in self._outputs.quantized.values() if isinstance(spec, GroupQuantizedSpec)]
        return self._unquantized_dtype == torch.bfloat16 and any(spec.bits == 4 for spec in codes)

    @property
    def _degrees(self) -> list[int]:
        quantized = self._outputs.quantized
        linears = []
        for linear in self._structure.block_linears:
            spec = quantized.get(linear.name)
            grouped = isinstance(spec, GroupQuantizedSpec)
            group_size = spec.group_size if spec is not None and spec.group_size < spec.in_features else None
            rows = spec.block[0] if isinstance(spec, Float8QuantizedSpec) else 1
            shape = linear.out_features, linear.in_features
            linears.append(SplitLinear(linear.name, *shape, group_size, grouped, rows))
        return degrees(self._config, linears)


def _kernel_notes(outputs: Outputs) -> list[str]:
    """Which processors and shapes vLLM's kernels need."""
    if isinstance(outputs.format, FloatQuantizedFormat | BlockFp8Format):
        return list(_FP8_NOTES if isinstance(outputs.format, FloatQuantizedFormat) else _BLOCK_FP8_NOTES)
    if isinstance(outputs.format, Float4Format):
        return _float4_notes(outputs.format.kind)
    if not isinstance(outputs.format, GptqFormat | AwqFormat):
        return []
    notes = ["the kernels need AVX-512 on x86 CPUs, compute capability 7.5 on NVIDIA GPUs"]
    uneven = [module for module, spec in outputs.quantized.items() if any(side % _CPU_MULTIPLE for side in spec.shape)]
    if uneven:
        notes.append(
            f"vLLM on CPUs wants inputs and outputs in multiples of {_CPU_MULTIPLE}, which {len(uneven)} layers are not"
        )
    return notes


def _float4_notes(kind: Float4Kind) -> list[str]:
    notes = [
        f"vLLM has no kernel for {kind.upper()} on CPUs; on NVIDIA GPUs from compute capability "
        f"{_FP4_CAPABILITIES[kind]} on Marlin multiplies the weights with 16-bit activations",
    ]
    return notes if kind == "nvfp4" else [*notes, _MXFP4_ACTIVATIONS]
