"""The names of a model's safetensors files, and the index that names several of them. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.errors import InputError
from qexport.tensors.strict_files import read_json_object

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

_INDEX_LIMIT: Final = 1 << 26
_MAX_TENSORS: Final = 1 << 19
"""Of all shards together."""


def read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`: the shard of each tensor.

    Raises:
        InputError: the file is not JSON, has a key twice, or its weight_map does not map names to names.
    """
    weight_map = read_json_object(path, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise InputError("weight_map must map tensors to file names", where=str(path), mend="fetch the index again")
    if len(weight_map) > _MAX_TENSORS:
        raise InputError(
            f"weight_map names {len(weight_map)} tensors; at most {_MAX_TENSORS} are read",
            where=str(path),
            mend="no model has as many; fetch the index again",
        )
    if not weight_map:
        raise InputError("weight_map is empty", where=str(path), mend="fetch the index again")
    return weight_map
