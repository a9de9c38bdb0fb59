"""Reading an artifact's weights back from disk, before it is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from qexport.artifact.digests import sha256_chunks
from qexport.errors import QexportError
from qexport.export.tensor_writer import WrittenWeights
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.safetensors_folder import INDEX_NAME

_CODES: Final = (torch.uint8, torch.int8, torch.int32)
"""What every format keeps its codes in, and no parameter."""


def check(folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
    """Compares what lies on the disk with what was computed.

    Args:
        folder: the artifact.
        written: every tensor that must be there, and no other, with the digest of its bytes when it was written.
        checked: a folder that has passed already; files that are links to its files are not hashed again.

    Raises:
        QexportError: a tensor is missing, unexpected, twice there, of another shape or dtype, or has other bytes; the
            index or one of the two quantization configs is wrong; or config.json claims codes where there are none.
    """
    places: dict[str, str] = {}
    specs, digests = written.specs, written.digests
    for path in sorted(folder.glob("*.safetensors")):
        linked = checked is not None and _is_linked(path, checked / path.name)
        with SafetensorsFile(path) as file:
            _check_file(file, path.name, specs, None if linked else digests, places)
    if missing := [name for name in specs if name not in places]:
        raise QexportError(f"{len(missing)} tensors are missing on the disk", where=", ".join(missing[:5]))
    _check_index(folder, places)
    _check_configs(folder)
    _check_claim(folder, specs)


def _is_linked(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def _check_file(
    file: SafetensorsFile,
    file_name: str,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, str] | None,
    places: dict[str, str],
) -> None:
    """Every tensor as planned, and, where digests are given, with the bytes that were written."""
    for name, found in file.specs().items():
        where = f"{file_name}: {name}"
        if name not in specs:
            raise QexportError("a tensor that was not planned is on the disk", where=where)
        if name in places:
            raise QexportError(f"a tensor is on the disk twice, also in {places[name]}", where=where)
        if found != specs[name]:
            raise QexportError(f"a tensor on the disk is {found} where {specs[name]} was planned", where=where)
        if digests is not None and sha256_chunks(file.chunks(name)) != digests[name]:
            raise QexportError(
                "a tensor's bytes on the disk are not those written", where=where, mend="check the disk, then run again"
            )
        places[name] = file_name


def _check_index(folder: Path, places: Mapping[str, str]) -> None:
    index = folder / INDEX_NAME
    sharded = len(set(places.values())) > 1
    if sharded != index.exists() or (sharded and _read(index)["weight_map"] != places):
        raise QexportError("the index does not fit the shards", where=INDEX_NAME)


def _check_configs(folder: Path) -> None:
    """Readers take either of the two, so they must say the same."""
    if (folder / "quantize_config.json").exists() and _read(folder / "config.json").get("quantization_config") != _read(
        folder / "quantize_config.json"
    ):
        raise QexportError("config.json and quantize_config.json differ", where="quantization_config")


def _check_claim(folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Loaders take the claim for true, and fill the weights that they do not find at random."""
    claimed = _read(folder / "config.json").get("quantization_config")
    if claimed and not any(spec.dtype in _CODES for spec in specs.values()):
        raise QexportError(
            f"config.json claims {claimed.get('quant_method')} codes, and no tensor holds any",
            where="quantization_config",
        )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
