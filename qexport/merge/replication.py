"""The base with some of its layers repeated, for adapters that were trained on such a model (`layer_replication`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import InputError
from qexport.merge.stored import Renamed

FIELD: Final = "layer_replication"
_MOST_LAYERS: Final = 1024


def with_layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The base with the layers that an adapter_config.json lists, in that order; itself if it lists none.

    Raises:
        InputError: the ranges are malformed, or name layers that the base does not have.
    """
    ranges = config.get(FIELD)
    if not ranges:
        return checkpoint
    old = checkpoint.architecture
    layers = _layers(ranges, len(old.structure.blocks))
    changed: dict[str, Any] = {**old.config, old.parsed.attribute_map.get(_COUNT, _COUNT): len(layers)}
    if isinstance(kinds := old.config.get("layer_types"), list):
        changed["layer_types"] = [kinds[layer] for layer in layers]
    architecture = Architecture(changed)
    sources = _sources(old.structure.blocks, architecture.structure.blocks, layers)
    names = {name: _stored(name, sources) for name in architecture.structure.parameters}
    return replace(checkpoint, architecture=architecture, weights=Renamed(checkpoint.weights, names))


_COUNT: Final = "num_hidden_layers"


def _layers(ranges: Any, count: int) -> list[int]:
    found = list[int]()
    for each in ranges if isinstance(ranges, list) else [None]:
        numbers = each if isinstance(each, Sequence) and len(each) == 2 else [None, None]
        start, end = numbers
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= count:
            raise InputError(
                f"{each!r} is no range of the base's {count} layers",
                where=f"adapter_config.json: {FIELD}",
                mend="give the base that the adapter was trained on",
            )
        found += range(start, end)
        if len(found) > _MOST_LAYERS:
            raise InputError(f"more than {_MOST_LAYERS} layers", where=f"adapter_config.json: {FIELD}")
    return found


def _sources(old: Sequence[str], new: Sequence[str], layers: Sequence[int]) -> Mapping[str, str]:
    return {f"{block}.": f"{old[layer]}." for block, layer in zip(new, layers, strict=True)}


def _stored(name: str, sources: Mapping[str, str]) -> str:
    for block, stored in sources.items():
        if name.startswith(block):
            return f"{stored}{name.removeprefix(block)}"
    return name
