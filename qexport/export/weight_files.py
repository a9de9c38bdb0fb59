"""The weights of an artifact as safetensors shards, written during the pass, and read back before publishing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch

from qexport.artifact.digests import FileDigests, sha256_chunks
from qexport.errors import CompatibilityError, QexportError, listed
from qexport.export.tensor_writer import ShardWriter, Stored, TensorWriter, WrittenWeights, shard_files
from qexport.formats import Outputs
from qexport.formats.format import Encoding
from qexport.tensors import TensorRecord, TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.safetensors_index import INDEX_NAME

_CODES: Final = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int32)
"""The dtypes of codes, which no unquantized parameter has."""


def check_written(folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
    """Compares what is on disk with what was computed.

    Args:
        folder: the artifact.
        written: the tensors that must be there, and no others, with the digests of their bytes when written.
        checked: a folder that has already passed; files that are hard links to its files are not hashed again.

    Raises:
        QexportError: a tensor is missing, unexpected or duplicated, or has another shape, dtype or bytes; the index
            does not fit the shards, or the two quantization configs differ; or config.json claims codes that do not
            exist.
    """
    places: dict[str, str] = {}
    specs, digests = written.specs, written.digests
    for path in sorted(folder.glob("*.safetensors")):
        linked = checked is not None and _is_linked(path, checked / path.name)
        with SafetensorsFile(path) as file:
            _check_file(file, path.name, specs, None if linked else digests, places)
    if missing := [name for name in specs if name not in places]:
        raise QexportError(f"{len(missing)} tensors are missing on disk", where=", ".join(missing[:5]))
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
    """Checks that every tensor is as planned and, if digests are given, has the bytes that were written."""
    for name, found in file.specs().items():
        where = f"{file_name}: {name}"
        if name not in specs:
            raise QexportError("a tensor that was not planned is on disk", where=where)
        if name in places:
            raise QexportError(f"a tensor is on disk twice, also in {places[name]}", where=where)
        if found != specs[name]:
            raise QexportError(f"a tensor on disk is {found}, but {specs[name]} was planned", where=where)
        if digests is not None and sha256_chunks(file.chunks(name)) != digests[name]:
            raise QexportError(
                "a tensor's bytes on disk are not those written",
                where=where,
                mend="check the disk, then run again",
            )
        places[name] = file_name


def _check_index(folder: Path, places: Mapping[str, str]) -> None:
    index = folder / INDEX_NAME
    sharded = len(set(places.values())) > 1
    if sharded != index.exists() or (sharded and _read(index)["weight_map"] != places):
        raise QexportError("the index does not fit the shards", where=INDEX_NAME)


def _check_configs(folder: Path) -> None:
    """Checks that both files say the same, since loaders read either of them."""
    if (folder / "quantize_config.json").exists() and _read(folder / "config.json").get("quantization_config") != _read(
        folder / "quantize_config.json"
    ):
        raise QexportError("config.json and quantize_config.json differ", where="quantization_config")


def _check_claim(folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Refuses a claim of codes without codes: loaders believe it, and initialize missing weights at random."""
    claimed = _read(folder / "config.json").get("quantization_config")
    if claimed and not any(spec.dtype in _CODES for spec in specs.values()):
        raise QexportError(
            f"config.json claims {claimed.get('quant_method')} codes, and no tensor holds any",
            where="quantization_config",
        )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True)
class WeightFiles:
    """The files that will be written, known before any weight is loaded.

    Attributes:
        encoding: the format of the tensors.
        outputs: what the pass will yield.
        max_shard_size: bytes of tensors in one file.
    """

    encoding: Encoding
    outputs: Outputs
    max_shard_size: int

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the files."""
        return {
            tensor: stored
            for name, spec in self.outputs.specs.items()
            for tensor, stored in self.encoding.specs(name, spec).items()
        }

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors; an upper bound if the length of one is not known yet."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors that are in another layout's files."""
        return 0

    @property
    def parameters(self) -> int:
        """Number of parameters of the model; a quantized weight counts once."""
        return sum(prod(spec.shape) for spec in self.outputs.specs.values())

    def equal(self, other: WeightFiles) -> bool:
        """Whether both would write the same bytes from the same pass."""
        return self.encoding == other.encoding and self.max_shard_size == other.max_shard_size

    def refuse_faults(self) -> None:
        """Refuses a plan with matrices that the format cannot store.

        Raises:
            CompatibilityError: a matrix cannot be stored; the error lists all that cannot.
        """
        faults = [
            f"{module}.weight: {reason}"
            for module, spec in self.outputs.quantized.items()
            if (reason := self.encoding.fault(spec))
        ]
        if faults:
            raise CompatibilityError(
                f"{len(faults)} layers do not fit the format of the file",
                where=listed(faults),
                mend="choose other bits or groups for these layers, or leave them unquantized",
            )

    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of each file that will be written, by name; upper bounds where `total_bytes` is one."""
        return shard_files(self.specs, self.max_shard_size)

    def writer(self, folder: Path) -> WeightWriter:
        """Starts the files in an existing, empty folder."""
        return WeightWriter(self, folder)

    def container(self, folder: Path) -> TensorWriter:
        """The writer of the files: safetensors shards."""
        return ShardWriter(folder, self.specs, self.max_shard_size)

    def read_back(self, folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
        """Compares what is on disk with what was computed; see `check_written`."""
        check_written(folder, written, checked=checked)


class WeightWriter:
    """Writes the records of the pass one by one, in any order. A context manager.

    A second thread writes one record while the next is computed.
    """

    def __init__(self, files: WeightFiles, folder: Path) -> None:
        self._encoding, self._folder, self._container = files.encoding, folder, files.container(folder)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, record: TensorRecord) -> None:
        """Packs one parameter, and writes it as soon as the previous one is written.

        Raises:
            QexportError: it differs from the plan, or was written before.
            OSError: the disk is full or failed.
        """
        tensors = self._encoding.tensors(record)
        self._wait()
        for name, tensor in tensors.items():
            self._container.check(name, tensor)
        self._pending = self._thread.submit(self._put, tensors)

    def adopt(self, tensors: Mapping[str, Stored]) -> None:
        """Takes tensors that an interrupted run has written as written. Their bytes are read and compared.

        Raises:
            ResourceError: the files do not hold them.
        """
        self._container.adopt(tensors)

    def written(self) -> dict[str, Stored]:
        """Every tensor in the files so far. They need not be durable yet.

        Raises:
            OSError: the disk is full or failed.
        """
        self._wait()
        digests = self._container.digests
        return {name: Stored(spec, digests[name]) for name, spec in self._container.written.items()}

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files of some tensors."""
        return {self._container.places[name][0] for name in names}

    def finish(self) -> WrittenWeights:
        """Completes the files.

        Raises:
            QexportError: a planned parameter was not written.
            OSError: the disk is full or failed.
        """
        self._wait()
        names = self._container.finish()
        return WrittenWeights(self._container.written, self._container.digests, FileDigests(self._folder, names, {}))

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the thread, so that nothing is written afterwards, even after an error."""
        self._thread.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._container.write(name, tensor)
