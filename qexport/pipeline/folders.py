"""The folder of one artifact, opened once for its checks, its measurement, its report and its manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from qexport.architectures.architecture import Architecture
from qexport.artifact.digests import FileDigests
from qexport.artifact.manifest import Sizes
from qexport.artifact.names import title
from qexport.artifact.report import Subject
from qexport.errors import InputError, listed
from qexport.export.layouts import Layout
from qexport.export.tensor_writer import WrittenWeights
from qexport.formats.stored_weight import StoredLayer
from qexport.pipeline.planning import Plan
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.records import LayerRecord

_ROW_BITS: Final = 8
"""Bits of LLM.int8, which a graph stores as it stores groups of GPTQ."""


@dataclass(frozen=True)
class ArtifactFolder:
    """An opened artifact, made by qexport or by another tool.

    Attributes:
        artifact: reads its tensors back.
        name: shown to people.
        layouts: the layouts with these weights; empty if another tool made the folder.
        layers: a record of each quantized layer, with its losses where they are known.
        stored: the same as the folder itself tells, without losses: what the gates' profile follows from.
        dtype: the reference's.
        digests: hex SHA-256 by file name, in several mappings that together have all weight files.
        loaders: the libraries that should load the folder, besides qexport.
    """

    artifact: StoredModel
    name: str
    layouts: Sequence[str]
    layers: Sequence[LayerRecord]
    stored: Sequence[LayerRecord]
    dtype: torch.dtype
    digests: Sequence[Mapping[str, str]]
    loaders: Sequence[str]

    @property
    def sizes(self) -> Sizes:
        """Parameters, bytes and bits per weight of its tensors."""
        parameters, total = self._parameters, self.artifact.stored_bytes
        return Sizes(parameters=parameters, total_bytes=total, bits_per_weight=8 * total / parameters)

    def subject(self) -> Subject:
        """The report's part about the artifact. Waits for the digests."""
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
    """The folder of a layout that this run has written.

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
    loaders: Sequence[str] = (),
) -> Iterator[ArtifactFolder]:
    """Opens a folder for the time of the context. Reads headers and config.json.

    Args:
        folder: the artifact's.
        reference: the reference's architecture.
        dtype: the reference's.
        name: shown to people.
        layouts: the layouts with these weights.
        layers: records of the quantized layers; those that the folder itself tells if empty.
        digests: known digests by file name; those of other weight files are computed when they are first needed.
        loaders: the libraries that should load the folder, besides qexport.

    Raises:
        InputError: the records are not those of the folder's layers.
    """
    with open_stored(folder, dtype=dtype, like=reference) as artifact:
        unknown = [file for file in artifact.files if file not in digests]
        if layers:
            refuse_other_layers(layers, artifact)
        stored = _stored_layers(artifact)
        yield ArtifactFolder(
            artifact=artifact,
            name=name,
            layouts=layouts,
            layers=layers or stored,
            stored=stored,
            dtype=dtype,
            digests=[digests, FileDigests(folder, unknown, {})],
            loaders=loaders,
        )


@contextmanager
def open_layout(
    planned: Plan, layout: Layout, folder: Path, layers: Sequence[LayerRecord], written: WrittenWeights
) -> Iterator[LayoutFolder]:
    """Opens the folder of a layout, whose files are written, for the time of the context.

    Args:
        planned: the run's plan.
        layout: the layout.
        folder: its folder.
        layers: the records of the quantized layers, unused if the layout has 16-bit weights.
        written: its weights.
    """
    merged = planned.merged
    adapter = merged.checkpoint.adapter
    own = layers if layout.quantization else ()
    fallen = [f"{layer.name} was rounded to nearest" for layer in own if layer.method == "round_to_nearest"]
    with open_folder(
        folder,
        merged.checkpoint.architecture,
        getattr(torch, planned.recipe.merge.dtype),
        name=title(merged.checkpoint.origin.name, adapter.name if adapter else None),
        layouts=[layout.name],
        layers=own,
        digests=written.files,
        loaders=layout.readers,
    ) as opened:
        notes = [*(merged.adapter.notes if merged.adapter else ()), *planned.protected.notes, *layout.notes, *fallen]
        yield LayoutFolder(opened, layout, written, notes)


def refuse_other_layers(records: Sequence[LayerRecord], artifact: StoredModel) -> None:
    """Compares records of quantized layers, which a manifest may hold, with the layers of a folder.

    Raises:
        InputError: a layer is in one of them alone, or its method, bits or groups differ.
    """
    told, stored = {record.name: record for record in records}, artifact.layers
    problems = [f"{name}: only in the manifest" for name in told.keys() - stored.keys()]
    problems += [f"{name}: not in the manifest" for name in stored.keys() - told.keys()]
    problems += [
        f"{name}: {record.bits} bits, {record.method}, groups of {record.group_size}, but stored are "
        f"{stored[name].bits} bits, {stored[name].method}, groups of {stored[name].group_size}"
        for name, record in told.items()
        if name in stored and not _is_stored_as(record, stored[name], apart=artifact.kind != "weights")
    ]
    if problems or len(told) < len(records):
        raise InputError(
            "the manifest's layers are not those of the artifact",
            where=listed(sorted(problems)) or "a layer is listed twice",
            mend="fetch the artifact again",
        )


_IN_GROUPS: Final[Mapping[str, set[str]]] = {
    "gptq": {"awq", "round_to_nearest"},
    "awq": {"round_to_nearest"},
}
"""How codes in groups may have been found, by the format that they are stored in."""


def _is_stored_as(record: LayerRecord, stored: StoredLayer, *, apart: bool) -> bool:
    """A layer whose weights are all equal has the same scale everywhere: then a file that stores a group as several
    blocks, a graph or GGUF, does not tell its groups.
    """
    methods = {stored.method} | _IN_GROUPS.get(stored.method, set())
    if not apart:
        return record.method in methods and (record.bits, record.group_size) == (stored.bits, stored.group_size)
    if stored.bits == _ROW_BITS:
        methods |= {"int8"}
    groups_fit = record.group_size > 0 and stored.group_size % record.group_size == 0
    return record.method in methods and record.bits == stored.bits and groups_fit


def _stored_layers(artifact: StoredModel) -> list[LayerRecord]:
    return [
        LayerRecord.uncalibrated(module, layer.method, layer.bits, layer.group_size)
        for module, layer in artifact.layers.items()
    ]
