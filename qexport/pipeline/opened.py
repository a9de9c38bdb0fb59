"""A finished folder, of qexport or of another maker, as its headers and small files tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from qexport.architectures.structure import Structure
from qexport.artifact.digests import FileDigests
from qexport.artifact.manifest import Sizes
from qexport.artifact.report import Subject
from qexport.reading.stored_model import holds_graph, open_stored
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantizedSpec


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
        graph: whether its model is an ONNX graph.
        files: the names of the files with the weights.
        digests: of these files among others, in parts.
    """

    folder: Path
    name: str
    layouts: Sequence[str]
    method: str
    sizes: Sizes
    reference_bytes: int
    layers: Sequence[LayerRecord]
    grids: Mapping[str, GroupQuantizedSpec]
    graph: bool
    files: Sequence[str]
    digests: Sequence[Mapping[str, str]]

    def subject(self) -> Subject:
        """The same for the report. Waits for the digests."""
        return Subject(
            name=self.name,
            layouts=list(self.layouts),
            method=self.method,
            sizes=self.sizes,
            reference_bytes=self.reference_bytes,
            weights_sha256={name: next(part[name] for part in self.digests if name in part) for name in self.files},
        )


def open_folder(
    folder: Path,
    structure: Structure,
    dtype: torch.dtype,
    *,
    name: str,
    layouts: Sequence[str] = (),
    layers: Sequence[LayerRecord] = (),
    digests: Mapping[str, str] = MappingProxyType({}),
) -> Opened:
    """Reads headers and config.json.

    Args:
        folder: the artifact.
        structure: the reference's.
        dtype: the reference's.
        name: for a reader.
        layouts: whose weights these are.
        layers: what is known of the quantized layers; found out from the headers where nothing is.
        digests: of files that are known; those of other weight files are taken when they are first asked for.

    Raises:
        InputError: the folder cannot be read.
    """
    with open_stored(folder, dtype=dtype) as source:
        parameters = sum(math.prod(shape) for shape in structure.parameters.values())
        total = source.stored_bytes
        return Opened(
            folder=folder,
            name=name,
            layouts=layouts,
            method=source.method,
            sizes=Sizes(parameters=parameters, total_bytes=total, bits_per_weight=8 * total / parameters),
            reference_bytes=parameters * dtype.itemsize,
            layers=layers
            or [
                LayerRecord.uncalibrated(module, layer.method, layer.bits, layer.group_size)
                for module, layer in source.layers.items()
            ],
            grids=_told_grids(source.grids, layers),
            graph=holds_graph(folder),
            files=source.files,
            digests=_digests(folder, source.files, digests),
        )


def _told_grids(
    grids: Mapping[str, GroupQuantizedSpec], layers: Sequence[LayerRecord]
) -> dict[str, GroupQuantizedSpec]:
    """With the groups that the layers were quantized in, where that is known: a graph may hold a group as several
    blocks, and rounding on those would be finer. Codes with one scale a row have no groups.
    """
    told = {layer.name: layer for layer in layers}
    in_rows = {layer.name for layer in layers if layer.method not in ("gptq", "round_to_nearest")}
    return {
        module: replace(grid, group_size=_group_size(grid, told.get(module)))
        for module, grid in grids.items()
        if module not in in_rows
    }


def _group_size(grid: GroupQuantizedSpec, told: LayerRecord | None) -> int:
    if told is None or told.group_size < 1 or grid.in_features % told.group_size:
        return grid.group_size
    return told.group_size


def _digests(folder: Path, files: Sequence[str], known: Mapping[str, str]) -> list[Mapping[str, str]]:
    """What is known, and the rest, to be taken."""
    return [known, FileDigests(folder, [name for name in files if name not in known], {})]
