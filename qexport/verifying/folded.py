"""The reference with the folds of an artifact, so that folded tensors are compared as exactly as others.

What source and consumers both show is applied to the reference (`qexport.architectures.folds`); an unquantized tensor
must then be equal to it as ever, and codes near it. Nothing is taken from the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from qexport.architectures.folds import (
    Fold,
    Gains,
    Shown,
    agreed,
    folded_inputs,
    folded_outputs,
    folds,
    shown_by_vector,
)
from qexport.architectures.structure import Structure
from qexport.reading.stored_model import StoredWeights
from qexport.tensors import GroupQuantized, Quantized, WeightSource
from qexport.verifying.grids import strips


class FoldedReference:
    """Folds the reference's tensors as the artifact's are.

    Args:
        structure: of both models.
        reference: the merged model's weights.
        artifact: the artifact's.

    Attributes:
        folded: the parameters that differ from the merged model by powers of two, so far.
        faults: of consumers whose columns show other powers of two than their source, by the parameter.
    """

    def __init__(self, structure: Structure, reference: WeightSource, artifact: StoredWeights) -> None:
        self._reference, self._artifact = reference, artifact
        with_zero_points = any(not grid.sym for grid in artifact.grids.values())  # AWQ's always have them
        found = folds(structure) if with_zero_points else []
        self._sources = {name: fold for fold in found for name in fold.parameters}
        self._consumers = {f"{name}.weight": fold for fold in found for name in fold.consumers}
        self._shown: dict[str, Tensor | None] = {}
        self._exponents: dict[str, Tensor | None] = {}
        self.folded: set[str] = set()
        self.faults: dict[str, str] = {}

    def see(self, name: str, stored: Tensor | Quantized, wanted: Tensor) -> None:
        """Takes notice of a tensor of both models, which spares reading it again."""
        fold = self._sources.get(name)
        if fold is not None and name == fold.parameters[0] and fold.source not in self._shown:
            shown = self._shown_by_source(name, stored, wanted)
            self._shown[fold.source] = shown if shown is not None and bool(shown.any()) else None

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the reference (or of the base) as it is where channels are folded."""
        found = _folded(tensor, self._of(self._consumers.get(name)), folded_inputs)
        found = _folded(found, self._of(self._sources.get(name)), folded_outputs)
        self.folded |= set() if found is tensor else {name}
        return found

    def inputs(self, name: str, inputs: Tensor) -> Tensor:
        """The inputs [tokens, in] of a layer of the reference, divided likewise."""
        exponents = self._of(self._consumers.get(name))
        return inputs if exponents is None else folded_inputs(inputs, -exponents)

    def _of(self, fold: Fold | None) -> Tensor | None:
        """The exponents of a fold, int64 [channels]; None if all are 0."""
        if fold is None:
            return None
        if fold.source not in self._exponents:
            divided = self._by_source(fold)
            self._exponents[fold.source] = None if divided is None else self._agreed(fold, divided)
        return self._exponents[fold.source]

    def _agreed(self, fold: Fold, divided: Tensor) -> Tensor | None:
        columns = {name: self._shown_by_consumer(name) for name in (f"{each}.weight" for each in fold.consumers)}
        exponents = agreed(divided, list(columns.values()))
        for name, shown in columns.items():
            if len(wrong := (shown.decided & (shown.exponents != exponents)).nonzero()[:, 0]):
                first = int(wrong[0])
                self.faults[name] = (
                    f"{fold.source} is not divided by what {len(wrong)} columns are multiplied by, the first one "
                    f"column {first} by 2**{int(shown.exponents[first])}"
                )
        return exponents if bool(exponents.any()) else None

    def _by_source(self, fold: Fold | None) -> Tensor | None:
        """The exponents that the source alone shows."""
        if fold is None:
            return None
        if fold.source not in self._shown:
            name = fold.parameters[0]
            self.see(name, self._artifact.stored(name), self._reference.read(name))
        return self._shown[fold.source]

    def _shown_by_source(self, name: str, stored: Tensor | Quantized, wanted: Tensor) -> Tensor | None:
        if isinstance(stored, Tensor):
            wanted = wanted.to(stored.dtype)
            if stored.equal(wanted):
                return None
            if stored.dim() == 1:
                return shown_by_vector(stored, wanted).divided
        elif not isinstance(stored, GroupQuantized):  # no folds are known with other codes
            return None
        wanted = _folded(wanted, self._by_source(self._consumers.get(name)), folded_inputs)
        return Gains.joined([Gains.of(*strip, 1) for strip in _strips(stored, wanted)]).shown().divided

    def _shown_by_consumer(self, name: str) -> Shown:
        wanted = _folded(self._reference.read(name), self._by_source(self._sources.get(name)), folded_outputs)
        first, *others = [Gains.of(*strip, 0) for strip in _strips(self._artifact.stored(name), wanted)]
        return reduce(Gains.plus, others, first).shown()


def _folded(tensor: Tensor, exponents: Tensor | None, fold: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return tensor if exponents is None else fold(tensor, exponents)


def _strips(stored: Tensor | Quantized, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, float32."""
    if isinstance(stored, Tensor):
        yield stored.to(torch.float32), wanted.to(torch.float32)
        return
    for strip in strips(stored, wanted, rounded=True):
        yield strip.values, strip.reference
