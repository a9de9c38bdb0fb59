"""Holds every tensor of an artifact against the merged reference's, while both models are read block by block.

The reference runs a block before the artifact does. What it has read of the block stays in memory until the artifact
has read the same tensor, so that together they never take more than a block and a tensor, and nothing is read again.
The exceptions are tensors of the base that the adapter changes, experts (which a block holds in another form), and all
tensors of a graph, which is not read block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from qexport.amounts import counted
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import CheckResult, Figure
from qexport.artifact.measurements import LayerWeights, TensorFault, WeightsRecord
from qexport.reading.filled_model import as_parameter
from qexport.reading.quantized_linear import dequantize
from qexport.reading.stored_model import StoredWeights
from qexport.tensors import Quantized, TensorSpec, WeightSource
from qexport.verifying.adapter_strength import moved_by_rounding, strength_by_weights, survival
from qexport.verifying.folded import FoldedReference
from qexport.verifying.layer_inputs import NO_KEPT_INPUTS, KeptInputs, LayerInputs
from qexport.verifying.matrices import MatrixErrors, compare_matrix, projections
from qexport.verifying.matrix_faults import Fault
from qexport.verifying.reference import Reference
from qexport.verifying.unquantized import difference

_NAMED: Final = 3


@dataclass(frozen=True)
class ComparedWeights:
    """What the comparison of all tensors found.

    Attributes:
        record: for the report.
        checks: of the gate `weights`.
        figures: `adapter_strength_weights` and `adapter_survival`, if there is an adapter.
        errors: of each quantized layer, by its name.
    """

    record: WeightsRecord
    checks: list[CheckResult]
    figures: list[Figure]
    errors: Mapping[str, MatrixErrors]


class WeightCheck:
    """Compares each tensor of an artifact once, when it is read.

    Args:
        artifact: what is compared.
        reference: with what.

    Attributes:
        reference_weights: the merged model's, to be read in place of it.
        artifact_weights: the artifact's, likewise.
        kept: tensors of the reference that wait for the artifact's.
    """

    def __init__(self, artifact: StoredWeights, reference: Reference) -> None:
        self._artifact, self._reference = artifact, reference
        self._pending = dict.fromkeys(artifact.specs())
        self.kept: dict[str, Tensor] = {}
        self._parts = reference.merged.architecture.naming.parts
        self._layers: dict[str, MatrixErrors] = {}
        self._exact: set[str] = set()
        self._faults: dict[str, str] = {}
        self._changes: dict[bool, list[Tensor]] = {True: [], False: []}
        self._survivals: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._inputs: LayerInputs | None = None
        merged = reference.merged
        self._folds = FoldedReference(merged.architecture.structure, merged.weights, artifact)
        self.reference_weights: WeightSource = ReferenceWeights(self, reference.merged.weights)
        self.artifact_weights: WeightSource = ArtifactWeights(self, artifact)

    def watch(self, reference: BlockRunner, others: KeptInputs = NO_KEPT_INPUTS) -> LayerInputs:
        """Compares the layers' outputs too, on inputs that they get in this model, which runs before the artifact.

        Args:
            reference: the model.
            others: where the inputs are read that are known, and others are kept.

        Returns:
            What the inputs are to be handed to.
        """
        self._inputs = LayerInputs(reference, self._pending, others)
        return self._inputs

    def finish(self) -> ComparedWeights:
        """Compares what has not been read, and gives the results."""
        for name in list(self._pending):
            self.compare(name, self._artifact.stored(name))
        self.kept.clear()
        record = WeightsRecord(
            unquantized=len(self._artifact.specs()) - len(self._layers),
            unequal=[TensorFault(name=name, text=self._faults[name]) for name in self._in_order(self._faults)],
            layers=[self._record(name) for name in self._in_order(self._layers)],
        )
        changes = self._changes[True] or self._changes[False]
        strength = strength_by_weights(torch.cat(changes)) if changes else None
        left = survival(torch.cat(found)) if (found := self._left()) else None
        errors = {layer.name: self._layers[f"{layer.name}.weight"] for layer in record.layers}
        return ComparedWeights(record, list(self._checks(record)), [each for each in (strength, left) if each], errors)

    def _left(self) -> list[Tensor]:
        """The rows that tell what rounding has left of the adapter: in quantized layers, if it changes any. Those of
        codes that were found in several ways cannot be added; the most frequent way stands for all.
        """
        rows = list((self._survivals[True] or self._survivals[False]).values())
        kinds = [sum(each.shape[1] == columns for each in rows) for columns in (2, 5)]
        return [each for each in rows if each.shape[1] == (2 if kinds[0] >= kinds[1] else 5)]

    def _in_order(self, names: Mapping[str, object]) -> list[str]:
        return [name for name in self._artifact.specs() if name in names]

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keeps a tensor of the reference until the artifact's is read."""
        if name in self._pending and self._parts[name].expert is None:
            self.kept[name] = tensor

    def compare(self, name: str, stored: Tensor | Quantized) -> None:
        """Compares a tensor of the artifact, unless that has been done."""
        if name not in self._pending:
            return
        del self._pending[name]
        wanted = self.kept.pop(name, None)
        wanted = self._reference.merged.weights.read(name) if wanted is None else wanted
        base, inputs = self._base(name), None if self._inputs is None else self._inputs.take(name)
        if name in self._artifact.raised:
            wanted, base = _once_raised(wanted), None if base is None else _once_raised(base)
        self._folds.see(name, stored, wanted)
        wanted, base = self._folds.tensor(name, wanted), None if base is None else self._folds.tensor(name, base)
        inputs = None if inputs is None else self._folds.inputs(name, inputs)
        if isinstance(stored, Tensor):
            self._compare_unquantized(name, stored, wanted, base)
        else:
            self._compare_layer(name, stored, wanted, base, inputs)

    def _base(self, name: str) -> Tensor | None:
        """The tensor without the adapter, if the adapter changes it and not its shape."""
        base = self._reference.base.weights
        if name not in self._reference.changed or base.specs()[name].shape != self._artifact.specs()[name].shape:
            return None
        return base.read(name)

    def _compare_unquantized(self, name: str, stored: Tensor, wanted: Tensor, base: Tensor | None) -> None:
        if fault := difference(stored, wanted, base):
            self._faults[name] = fault
        if base is not None:
            rows = [tensor.reshape(len(tensor), -1) for tensor in (stored.to(torch.float32), wanted, base)]
            self._changes[False].append(projections(*rows))
            self._keep_survival(name, stored, wanted, base, _unchanged)

    def _compare_layer(
        self, name: str, stored: Quantized, wanted: Tensor, base: Tensor | None, inputs: Tensor | None
    ) -> None:
        if name.removesuffix(".weight") in self._artifact.transposed:
            wanted, base = wanted.t(), None if base is None else base.t()
        rounding = self._reference.rounding_of(wanted, stored)
        found = compare_matrix(stored, wanted, base, inputs, rounded=rounding is not None)
        if fault := self._folds.faults.get(name):
            found = replace(found, faults=[Fault(math.inf, fault), *found.faults])
        self._layers[name] = found
        self._exact |= {name} if rounding is not None else set()
        if found.change is not None:
            self._changes[True].append(found.change)
        if base is not None:
            self._keep_survival(name, stored, wanted, base, rounding)

    def _keep_survival(
        self,
        name: str,
        stored: Tensor | Quantized,
        wanted: Tensor,
        base: Tensor,
        rounding: Callable[[Tensor], Tensor | Quantized] | None,
    ) -> None:
        """What rounding has left of the adapter in one tensor, if it is known what the change was before all rounding.

        Args:
            name: the tensor's.
            stored: the artifact's, quantized codes [out, in].
            wanted: the reference's, likewise [out, in].
            base: the base's, likewise.
            rounding: how the codes were found; None if nobody knows what they would be for the base.
        """
        if self._reference.unrounded is None:
            return
        unrounded = self._folds.tensor(name, self._reference.unrounded.weights.read(name))
        quantized = not isinstance(stored, Tensor)
        if quantized and name.removesuffix(".weight") in self._artifact.transposed:
            unrounded = unrounded.t()
        values, before = _values(stored), base.to(wanted.dtype)
        if rounding is None:
            rows = projections(values, unrounded, base)
        else:
            shape = (len(values), -1)
            change = (unrounded - base.to(torch.float32)).reshape(shape)
            rows = moved_by_rounding(values.reshape(shape), _values(rounding(before)).reshape(shape), change)
        self._survivals[quantized][name] = rows

    def _record(self, name: str) -> LayerWeights:
        found = self._layers[name]
        return LayerWeights(
            name=name.removesuffix(".weight"),
            exact=name in self._exact,
            relative_error=found.relative_error,
            nearest_error=found.nearest_error,
            output_error=found.output_error,
            nearest_output_error=found.nearest_output_error,
            gain=found.gain,
            adapter_survival=self._survival_of(name),
            worst_row=found.worst_row,
            worst_row_ratio=found.worst_row_ratio,
            worst_group=found.worst_group,
            worst_group_ratio=found.worst_group_ratio,
            faults=[fault.text for fault in found.faults],
        )

    def _survival_of(self, name: str) -> float | None:
        rows = self._survivals[True].get(name)
        figure = None if rows is None else survival(rows)
        return None if figure is None else figure.value

    def _checks(self, record: WeightsRecord) -> Iterator[CheckResult]:
        if record.unquantized:
            unequal = [f"{fault.name}: {fault.text}" for fault in record.unequal]
            folded = len(self._folds.folded - self._layers.keys())
            powers = f", {folded} of them divided by powers of two that the next layers take back" if folded else ""
            equal = f"{counted(record.unquantized, 'tensor')} equal to the reference's{powers}"
            yield _check("unquantized tensors", unequal, equal)
        if self._layers:
            worst = sorted(self._layers.items(), key=lambda item: -max((f.severity for f in item[1].faults), default=0))
            faults = [f"{name.removesuffix('.weight')}: {each.faults[0].text}" for name, each in worst if each.faults]
            exact = f", {len(self._exact)} of them exactly" if self._exact else ""
            yield _check(
                "quantized layers", faults, f"{counted(len(self._layers), 'layer')} as the reference quantized{exact}"
            )


class ReferenceWeights:
    """The reference's weights. What is read is kept for the comparison."""

    def __init__(self, check: WeightCheck, weights: WeightSource) -> None:
        self._check, self._weights = check, weights

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource`."""
        return self._weights.specs()

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        tensor = self._weights.read(name)
        self._check.keep(name, tensor)
        return tensor


class ArtifactWeights:
    """The artifact's weights. What is read is compared."""

    def __init__(self, check: WeightCheck, artifact: StoredWeights) -> None:
        self._check, self._artifact = check, artifact

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource`."""
        return self._artifact.specs()

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        stored, module = self._artifact.stored(name), name.removesuffix(".weight")
        self._check.compare(name, stored)
        return as_parameter(stored, self.specs()[name].dtype, transposed=module in self._artifact.transposed)


def _unchanged(matrix: Tensor) -> Tensor:
    return matrix


def _once_raised(weight: Tensor) -> Tensor:
    """What is left of a tensor that was stored plus 1, in its own dtype. The model too adds 1 in float32."""
    return (weight.to(torch.float32) + 1 - 1).to(weight.dtype)


def _values(stored: Tensor | Quantized) -> Tensor:
    return stored.to(torch.float32) if isinstance(stored, Tensor) else dequantize(stored, torch.float32)


def _check(name: str, faults: Sequence[str], sound: str) -> CheckResult:
    rest = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    detail = f"{'; '.join(faults[:_NAMED])}{rest}" if faults else sound
    return CheckResult(gate="weights", name=name, passed=not faults, detail=detail)
