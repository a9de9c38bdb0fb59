"""What a layout is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qexport.artifact.manifest import GraphRecord
from qexport.export.weight_files import WeightFiles
from qexport.tensors import Checkpoint


class Layout(Protocol):
    """One folder for one kind of reader. Made from the plan alone; what it cannot carry it refuses when it is made."""

    @property
    def name(self) -> str:
        """The name in the recipe's `export`."""
        ...

    @property
    def readers(self) -> Sequence[str]:
        """Those who are to read the folder, besides qexport."""
        ...

    @property
    def weights(self) -> WeightFiles:
        """The weights that it wants in the folder; layouts with equal ones share the files."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` in its config.json; None where the folder holds 16-bit weights."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a user of this folder should know."""
        ...

    @property
    def graph(self) -> GraphRecord | None:
        """What the manifest says of a graph in the folder; None where there is none."""
        ...

    def prepare(self) -> None:
        """Does, before anything is quantized, what needs no weights and may fail.

        Raises:
            CompatibilityError: the model cannot be laid out so.
        """
        ...

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes everything but the weights and the manifest into the folder, which holds the weights.

        Raises:
            QexportError: a file cannot be written.
        """
        ...

    def check(self, folder: Path) -> None:
        """Holds the finished folder against what its readers demand.

        Raises:
            QexportError: a demand is not met.
        """
        ...
