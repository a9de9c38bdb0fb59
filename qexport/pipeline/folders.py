"""The folder of one artifact, opened once: from the check to the measurement to the report and the manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from qexport.architectures.architecture import Architecture
from qexport.artifact.digests import FileDigests
from qexport.artifact.manifest import Sizes
from qexport.artifact.report import Subject
from qexport.export.layouts import Layout
from qexport.export.tensor_writer import WrittenWeights
from qexport.pipeline.planning import Plan
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantizedSpec


@dataclass(frozen=True)
class ArtifactFolder:
    """An artifact of qexport or of another maker.

    Attributes:
        artifact: its reader.
        name: for a reader.
        layouts: whose weights these are; empty for a folder of another maker.
        layers: of each quantized layer; what quantizing it did, where that is known.
        grids: of the layers that are quantized in groups.
        dtype: the reference's.
        digests: of the files with the weights among others, in parts.
        readers: what the folder is for, besides qexport.
    """

    artifact: StoredModel
    name: str
    layouts: Sequence[str]
    layers: Sequence[LayerRecord]
    grids: Mapping[str, GroupQuantizedSpec]
    dtype: torch.dtype
    digests: Sequence[Mapping[str, str]]
    readers: Sequence[str]

    @property
    def sizes(self) -> Sizes:
        """Of its tensors."""
        parameters, total = self._parameters, self.artifact.stored_bytes
        return Sizes(parameters=parameters, total_bytes=total, bits_per_weight=8 * total / parameters)

    def subject(self) -> Subject:
        """What the report says of it. Waits for the digests."""
        return Subject(
            name=self.name,
            layouts=list(self.layouts),
            method=self.artifact.method,
            sizes=self.sizes,
            reference_bytes=self._parameters * self.dtype.itemsize,
            weights_sha256={
                name: next(part[name] for part in self.digests if name in part) for name in self.artifact.files
            },
        )

    @property
    def _parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.artifact.architecture.structure.parameters.values())


@dataclass(frozen=True)
class LayoutFolder:
    """A layout's folder that this run has written.

    Attributes:
        opened: the folder, read back.
        layout: the layout.
        written: its weights.
        notes: what a user should know.
    """

    opened: ArtifactFolder
    layout: Layout
    written: WrittenWeights
    notes: Sequence[str]


@contextmanager
def open_folder(
    folder: Path,
    reference: Architecture,
    dtype: torch.dtype,
    *,
    name: str,
    layouts: Sequence[str] = (),
    layers: Sequence[LayerRecord] = (),
    digests: Mapping[str, str] = MappingProxyType({}),
    readers: Sequence[str] = (),
) -> Iterator[ArtifactFolder]:
    """Opens a folder for as long as the context lasts. Reads headers and config.json.

    Args:
        folder: where the artifact lies.
        reference: the reference's architecture.
        dtype: the reference's.
        name: for a reader.
        layouts: whose weights these are.
        layers: what is known of the quantized layers; found out from the headers where nothing is.
        digests: of files that are known; those of other weight files are taken when they are first asked for.
        readers: what the folder is for, besides qexport.

    Raises:
        InputError: the folder cannot be read.
    """
    with open_stored(folder, dtype=dtype, like=reference) as artifact:
        unknown = [file for file in artifact.files if file not in digests]
        yield ArtifactFolder(
            artifact=artifact,
            name=name,
            layouts=layouts,
            layers=layers
            or [
                LayerRecord.uncalibrated(module, layer.method, layer.bits, layer.group_size)
                for module, layer in artifact.layers.items()
            ],
            grids=_told_grids(artifact.grids, layers),
            dtype=dtype,
            digests=[digests, FileDigests(folder, unknown, {})],
            readers=readers,
        )


@contextmanager
def open_layout(
    planned: Plan, layout: Layout, folder: Path, layers: Sequence[LayerRecord], written: WrittenWeights
) -> Iterator[LayoutFolder]:
    """Opens the folder of a layout once its files are written, for as long as the context lasts.

    Args:
        planned: the run's plan.
        layout: the layout.
        folder: its folder.
        layers: what quantizing each layer did; the layout may have 16-bit weights.
        written: its weights.
    """
    merged = planned.merged
    origins = [merged.checkpoint.origin, *([merged.adapter.origin] if merged.adapter else [])]
    own = layers if layout.quantization else ()
    fallen = [f"{layer.name} was rounded to nearest" for layer in own if layer.method == "round_to_nearest"]
    with open_folder(
        folder,
        merged.checkpoint.architecture,
        getattr(torch, planned.recipe.merge.dtype),
        name=" + ".join(origin.name.rpartition("/")[2] for origin in origins),
        layouts=[layout.name],
        layers=own,
        digests=written.files,
        readers=layout.readers,
    ) as opened:
        notes = [*(merged.adapter.notes if merged.adapter else ()), *layout.notes, *fallen]
        yield LayoutFolder(opened, layout, written, notes)


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
