"""A finished folder, of qexport or of another maker, as its headers and small files tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.architectures.structure import Structure
from qexport.artifact.file_digests import FileDigests
from qexport.artifact.manifest import LayerRecord, Sizes
from qexport.artifact.report import Subject
from qexport.errors import InputError
from qexport.reading.artifact_source import ArtifactSource
from qexport.reading.bitsandbytes_format import FourBitWeight, LlmInt8Weight
from qexport.reading.compressed_tensors_format import PackedWeight, RowWeight
from qexport.reading.gptq_format import GptqWeight
from qexport.reading.stored_format import Scheme, StoredWeight
from qexport.tensors import GroupQuantizedSpec
from qexport.tensors.quantized import LayerMethod


@dataclass(frozen=True)
class Opened:
    """What is known of a folder before its weights are read.

    Attributes:
        folder: the artifact.
        name: for a reader.
        layouts: whose weights these are; empty for a folder of another maker.
        method: for a reader.
        sizes: of its tensors.
        reference_bytes: of the merged model's.
        layers: of each quantized layer; what quantizing it did, where the manifest tells.
        grids: of the layers that are quantized in groups.
        digests: of the weight files.
    """

    folder: Path
    name: str
    layouts: Sequence[str]
    method: str
    sizes: Sizes
    reference_bytes: int
    layers: Sequence[LayerRecord]
    grids: Mapping[str, GroupQuantizedSpec]
    digests: Mapping[str, str]

    def subject(self) -> Subject:
        """The same for the report. Waits for the digests."""
        return Subject(
            name=self.name,
            layouts=list(self.layouts),
            method=self.method,
            sizes=self.sizes,
            reference_bytes=self.reference_bytes,
            weights_sha256=dict(self.digests),
        )


def open_folder(
    folder: Path,
    structure: Structure,
    dtype: torch.dtype,
    *,
    name: str,
    layouts: Sequence[str] = (),
    layers: Sequence[LayerRecord] = (),
    digests: Mapping[str, str] | None = None,
) -> Opened:
    """Reads headers and config.json.

    Args:
        folder: the artifact.
        structure: the reference's.
        dtype: the reference's.
        name: for a reader.
        layouts: whose weights these are.
        layers: what is known of the quantized layers; found out from the headers where nothing is.
        digests: of the weight files; taken when they are first asked for where None.

    Raises:
        InputError: the folder cannot be read.
    """
    with ArtifactSource(folder, dtype=dtype) as source:
        parameters = sum(math.prod(shape) for shape in structure.parameters.values())
        total = source.stored_bytes
        return Opened(
            folder=folder,
            name=name,
            layouts=layouts,
            method=describe_method(source.quantization),
            sizes=Sizes(parameters=parameters, total_bytes=total, bits_per_weight=8 * total / parameters),
            reference_bytes=parameters * dtype.itemsize,
            layers=layers or [_layer(module, weight) for module, weight in source.quantized.items()],
            grids=source.grids,
            digests=digests if digests is not None else FileDigests(folder, _weight_files(folder), {}),
        )


def describe_method(quantization: Mapping[str, Any] | None) -> str:
    """A `quantization_config` for a reader."""
    config = quantization or {}
    match config.get("quant_method"):
        case None:
            return "dense"
        case "gptq":
            symmetry = "symmetric" if config["sym"] else "asymmetric"
            return f"GPTQ, {config['bits']} bits, group_size {config['group_size']}, {symmetry}"
        case "bitsandbytes" if config.get("load_in_4bit"):
            double = ", double quantization" if config.get("bnb_4bit_use_double_quant") else ""
            return f"{str(config.get('bnb_4bit_quant_type', 'fp4')).upper()}{double}"
        case "bitsandbytes":
            return "LLM.int8"
        case "compressed-tensors":
            return f"compressed-tensors, {config['format']}"
        case name:
            return str(name)


def _layer(module: str, weight: StoredWeight) -> LayerRecord:
    method, bits, group_size = _scheme(module, weight)
    return LayerRecord(
        name=module,
        method=method,
        bits=bits,
        group_size=group_size,
        loss=None,
        rtn_loss=None,
        damp_percent=None,
        tokens=0,
        dead_columns=0,
    )


def _scheme(module: str, weight: StoredWeight) -> tuple[LayerMethod, int, int]:
    """Method, bits, and values that share a scale.

    Raises:
        InputError: there are codes, and the config says nothing of them.
    """
    match weight:
        case FourBitWeight(spec=spec):
            return spec.quant_type, 4, spec.block_size
        case LlmInt8Weight():
            return "int8", 8, weight.shape[1]
        case RowWeight():
            return "w8a8", 8, weight.shape[1]
        case GptqWeight(scheme=Scheme() as scheme) | PackedWeight(scheme=Scheme() as scheme):
            return "gptq", scheme.bits, weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        case _:
            raise InputError(
                "a module is quantized that should be dense",
                where=f"config.json: quantization_config, {module}",
                mend="fetch the artifact again, or ask its maker: weights and config.json do not belong together",
            )


def _weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))
