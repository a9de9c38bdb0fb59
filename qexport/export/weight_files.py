"""The weights of an artifact as safetensors shards, fed by the pass."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from qexport.artifact.digests import FileDigests
from qexport.errors import CompatibilityError, listed
from qexport.export import readback
from qexport.export.shards import ShardWriter
from qexport.export.tensor_writer import TensorWriter, WrittenWeights
from qexport.formats import Outputs
from qexport.formats.format import Encoding
from qexport.tensors import TensorRecord, TensorSpec


@dataclass(frozen=True)
class WeightFiles:
    """What will be written, known before anything is loaded.

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
        """Bytes of all tensors; the most where the length of one is known only when it comes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors that lie in another layout's files."""
        return 0

    @property
    def parameters(self) -> int:
        """Parameters of the model, each quantized weight counted once."""
        return sum(prod(spec.shape) for spec in self.outputs.specs.values())

    def equal(self, other: WeightFiles) -> bool:
        """Whether both would write the same bytes from the same pass."""
        return self.encoding == other.encoding and self.max_shard_size == other.max_shard_size

    def refuse_faults(self) -> None:
        """Holds every quantized matrix against the format.

        Raises:
            CompatibilityError: one or more cannot be stored; all are listed.
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

    def writer(self, folder: Path) -> WeightWriter:
        """Starts the files in an existing, empty folder."""
        return WeightWriter(self, folder)

    def container(self, folder: Path) -> TensorWriter:
        """What the tensors are put into: shards of safetensors."""
        return ShardWriter(folder, self.specs, self.max_shard_size)

    def read_back(self, folder: Path, written: WrittenWeights, *, checked: Path | None = None) -> None:
        """Compares what lies on the disk with what was computed; see `readback.check`."""
        readback.check(folder, written, checked=checked)


class WeightWriter:
    """Takes the pass's records one by one, in any order. A context manager.

    One record is written by a thread of its own while the next is computed.
    """

    def __init__(self, files: WeightFiles, folder: Path) -> None:
        self._encoding, self._folder, self._container = files.encoding, folder, files.container(folder)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, record: TensorRecord) -> None:
        """Packs one parameter, and writes it as soon as the one before is written.

        Raises:
            QexportError: it was not planned so, or was written before.
            OSError: the disk is full or failed.
        """
        tensors = self._encoding.tensors(record)
        self._wait()
        for name, tensor in tensors.items():
            self._container.check(name, tensor)
        self._pending = self._thread.submit(self._put, tensors)

    def finish(self) -> WrittenWeights:
        """Completes the files.

        Raises:
            QexportError: a planned parameter never came.
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
        """Nothing is written afterwards, not even where an error has come in between."""
        self._thread.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._container.write(name, tensor)
