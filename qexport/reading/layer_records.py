"""Whether the layers that a manifest names are those that a folder stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from qexport.errors import InputError, listed
from qexport.formats.stored_weight import StoredLayer
from qexport.reading.stored_model import Kind, StoredModel
from qexport.records import LayerRecord

_ONE_TYPE: Final = 4
"""The bits that GGUF gives codes of 2 to 4."""

_ROW_BITS: Final = 8
"""Bits of the methods with a scale for each row, whose codes a graph and GGUF store as they store groups of GPTQ."""


def refuse_other_layers(records: Sequence[LayerRecord], artifact: StoredModel) -> None:
    """Compares records of quantized layers, which a manifest may hold, with the layers of a folder.

    Raises:
        InputError: a layer is in one of them alone, or its method, bits or groups differ.
    """
    told, stored = {record.name: record for record in records}, artifact.layers
    problems = [f"{name}: only in the manifest" for name in told.keys() - stored.keys()]
    rounded = {artifact.architecture.structure.head} if artifact.kind != "weights" else set()  # by the layout
    problems += [f"{name}: not in the manifest" for name in stored.keys() - told.keys() - rounded]
    problems += [
        f"{name}: {record.bits} bits, {record.method}, groups of {record.group_size}, but stored are "
        f"{stored[name].bits} bits, {stored[name].method}, groups of {stored[name].group_size}"
        for name, record in told.items()
        if name in stored and not _is_stored_as(record, stored[name], artifact.kind)
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


def _is_stored_as(record: LayerRecord, stored: StoredLayer, kind: Kind) -> bool:
    """A layer whose weights are all equal has the same scale everywhere: then a file that stores a group as several
    blocks, a graph or GGUF, does not tell its groups. Where its weights are zero, GGUF does not tell its bits either,
    since codes of 2 to 4 bits are stored alike.
    """
    methods = {stored.method} | _IN_GROUPS.get(stored.method, set())
    if kind == "weights":
        return record.method in methods and (record.bits, record.group_size) == (stored.bits, stored.group_size)
    if stored.bits == _ROW_BITS:
        methods |= {"int8", "w8a8"}
    groups_fit = record.group_size > 0 and stored.group_size % record.group_size == 0
    bits_fit = record.bits == stored.bits or (kind == "gguf" and stored.bits < record.bits <= _ONE_TYPE)
    return record.method in methods and bits_fit and groups_fit
