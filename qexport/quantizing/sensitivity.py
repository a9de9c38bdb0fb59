"""How far the model's predictions move when a few of its layers are quantized, for many choices of layers at once.

With the weights W and a small change D of them, the divergence of the predictions of a window is, to second order,
`KL = E[<g, D>^2] / 2`, where g is the gradient of `sum_t log p(y_t)` with respect to W and every y_t is drawn from
the model's own prediction p: the curvature of KL is the Fisher information. One pass back through the blocks gives g of
every layer, so the effect of every layer at the head, through all blocks after it, costs as much as that of one.

D comes from GPTQ, with Hessians of other windows in the unquantized model. Experts are rounded to nearest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Final, TypeVar

import torch
from torch import Tensor

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.sending import Sender, Tensors, sends
from qexport.architectures.structure import LinearSpec
from qexport.errors import NumericalError
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution, Later, WorkerLostError, begun_anew
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.quantizing.draws_ahead import DrawsAhead
from qexport.quantizing.layer import FactorizedHessian, Hessian, dealt_rows, row_energies, total, usable
from qexport.quantizing.sensitivity_share import Codes, SensitivityInputs, SensitivityShare
from qexport.quantizing.shards import shared_out
from qexport.quantizing.solver import ROWS_TOGETHER, Options, factorize, round_to_nearest, solve
from qexport.quantizing.tiles import tile
from qexport.tensors import GroupQuantized

_BATCH_TOKENS: Final = 2048
"""Tokens that go forward through a block at a time. The last bits depend on it."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Unit:
    """Layers of one block that are quantized alike.

    Attributes:
        layers: which share an input, or are the experts of a mixture.
        options: how they may be quantized.
    """

    layers: tuple[LinearSpec, ...]
    options: tuple[Options, ...]


@dataclass(frozen=True)
class Effects:
    """What the options of a unit do.

    Attributes:
        products: <g, D>, float64 [windows, options].
        errors: of each option, the mean square of what D changes in the layers' outputs, summed over the outputs.
        tokens: of a window.
    """

    products: Tensor
    errors: tuple[float, ...]
    tokens: int

    @property
    def divergences(self) -> list[float]:
        """The mean KL divergence in nats per token that each option costs alone, from its own products.

        Their mean square is taken from their mean size, of which it is pi / 2 of the square for normal values. The mean
        of the squares themselves is often that of one window (up to 92 % of it on Gemma3-270M), in which an unlikely
        token was drawn and the second order does not hold.
        """
        return (self.products.abs().mean(0).square() * (math.pi / (4 * self.tokens))).tolist()

    @property
    def losses(self) -> list[float]:
        """The same with less noise: an option's error times what the unit's errors cost at the head, which is the mean
        over its options. Choices by the divergences alone would favor the options whose noise was lucky.
        """
        pairs = list(zip(self.divergences, self.errors, strict=True))
        gains = [divergence / error for divergence, error in pairs if error > 0]
        return [error * sum(gains) / len(gains) if gains else divergence for divergence, error in pairs]


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    input_ids: Tensor,
    hessian_ids: Tensor,
    *,
    device: torch.device,
    execution: Execution = INLINE,
    progress: ProgressCallback,
) -> list[Effects]:
    """What every unit and option does to the predictions.

    Computed in float32, with the same bits for any number of threads and workers. In memory there are the weights of
    one block with a change of them for each option, and the hidden states of all windows before every block; each
    worker has those of its own windows.

    Args:
        checkpoint: the merged model.
        units: in any order.
        input_ids: int64 [windows, tokens], where the predictions are looked at.
        hessian_ids: int64 [other windows, tokens], for the Hessians. On the windows that they were fitted to, the codes
            would look better than they are: by a third on SmolLM2 with 4,096 tokens.
        device: where to compute.
        execution: the workers, to whom windows and the rows of layers are dealt out.
        progress: is called with each block.

    Returns:
        Of each unit.

    Raises:
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
        WorkerLostError: workers went in each attempt.
    """
    with closing(_Measurement(checkpoint, units, input_ids, hessian_ids, device, execution)) as work:

        def renew(error: WorkerLostError) -> None:
            progress(Notice(f"{error.what}; the effect of each layer is measured anew"))
            work.renew()

        return begun_anew(partial(work.run, progress), renew)


@dataclass(frozen=True)
class _SolvedUnit:
    """What each option makes of a unit, and the error of its outputs."""

    codes: list[Codes]
    errors: tuple[float, ...]


class _Measurement:
    """The shares of all workers, and what is solved between their steps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Sequence[Unit],
        input_ids: Tensor,
        hessian_ids: Tensor,
        device: torch.device,
        execution: Execution,
    ) -> None:
        architecture = checkpoint.architecture.in_dtype(torch.float32)
        structure, device = architecture.structure, torch.device(device.type) if execution.apart else device
        self._units, self._structure, self._device, self._execution = units, structure, device, execution
        self._tokens, batches = input_ids.shape[1], hessian_ids.split(max(1, _BATCH_TOKENS // hessian_ids.shape[1]))
        windows = shared_out(len(input_ids), execution.workers)
        of_batches = shared_out(len(batches), len(windows))
        self._own = [
            (input_ids[own.start : own.stop].split(1), [] if batch is None else batches[batch.start : batch.stop])
            for own, batch in zip_longest(windows, of_batches)
        ]
        self._firsts = [own.start for own in windows]
        shared = SensitivityInputs(architecture, None if sends(execution, device) else checkpoint.weights, str(device))
        self._shares = execution.host(SensitivityShare, [(shared,)] * len(windows))
        self._sender = Sender(checkpoint.weights, structure, execution, device)
        self._draws = DrawsAhead([self._tokens] * len(input_ids), self._firsts, structure)

    def close(self) -> None:
        """Frees what the shares hold."""
        self._draws.close()
        self._sender.close()
        with suppress(WorkerLostError):
            _results([share.call(SensitivityShare.close) for share in self._shares])

    def renew(self) -> None:
        """Replaces the shares whose workers have gone."""
        self._execution.renew(self._shares)

    def run(self, progress: ProgressCallback) -> list[Effects]:
        """All steps from the first one on."""
        blocks, sender, found = len(self._structure.blocks), self._sender, dict[int, Effects]()
        outside = sender.outside()
        _results(
            share.call(SensitivityShare.begin, *own, outside)
            for share, own in zip(self._shares, self._own, strict=True)
        )
        for index in range(blocks):
            tensors = sender.block(index, min(index + 1, blocks - 1))
            _results([share.call(SensitivityShare.forward, index, tensors) for share in self._shares])
            progress(Progress("calibrate", index + 1, 2 * blocks, "block", "forward"))
        _results(
            share.call(SensitivityShare.at_head, self._draws.before(first), outside)
            for share, first in zip(self._shares, self._firsts, strict=True)
        )
        summed = deque[tuple[Later[list[Hessian]], Tensors | None]]()
        ahead = len(self._shares) if self._execution.apart else 1
        for index in reversed(range(blocks)):
            for later in range(index - len(summed), max(-1, index - ahead), -1):
                tensors = sender.block(later, later - 1)
                summed.append((self._summed(later, tensors), tensors))
            found |= self._measured(index, *summed.popleft())
            progress(Progress("calibrate", 2 * blocks - index, 2 * blocks, "block", "back"))
        return [found[number] for number in range(len(self._units))]

    def _own_units(self, index: int) -> dict[int, Unit]:
        """The units of a block, by their numbers."""
        linears = self._structure.linears[self._structure.blocks[index]]
        return {number: unit for number, unit in enumerate(self._units) if unit.layers[0] in linears}

    def _summed(self, index: int, tensors: Tensors | None) -> Later[list[Hessian]]:
        """The Hessians of a block's units that are not experts. They go from worker to worker, each of which adds its
        batches; meanwhile those before it are at the blocks that come next.
        """
        shared = [unit.layers[0] for unit in self._own_units(index).values() if not unit.layers[0].expert]
        hessians = [Hessian(layer.in_features, self._device) for layer in shared]
        first, *others = [share for share, (_, batches) in zip(self._shares, self._own, strict=True) if batches]
        later = first.call(SensitivityShare.add, index, hessians, shared, tensors)
        for share in others:
            later = share.call(SensitivityShare.add, index, later.argument, shared, tensors)
        return later

    def _measured(self, index: int, summed: Later[list[Hessian]], tensors: Tensors | None) -> dict[int, Effects]:
        """The effects of a block's units, by their numbers."""
        own, hessians = self._own_units(index), summed.result()
        solved = []
        for unit in own.values():
            weights = self._shares[0].call(SensitivityShare.matrices, index, unit.layers, tensors).result()
            hessian = None if unit.layers[0].expert else hessians.pop(0)
            solved.append(_solved(unit, weights, hessian, self._execution))
        errors = [each.errors for each in solved]
        linears = {linear.name: linear for unit in own.values() for linear in unit.layers}
        codes = self._execution.once([each.codes for each in solved]).argument
        products = _results(
            [share.call(SensitivityShare.back, index, codes, linears, tensors) for share in self._shares]
        )
        return {
            number: Effects(torch.cat([each[place] for each in products]), errors[place], self._tokens)
            for place, number in enumerate(own)
        }


def _results(calls: Iterable[Later[Value]]) -> list[Value]:
    """Makes all calls, then waits for them."""
    return [later.result() for later in list(calls)]


def _solved(unit: Unit, weights: Tensors, hessian: Hessian | None, execution: Execution) -> _SolvedUnit:
    """The unit's layers with each option, whose errors are summed in the order of the layers."""
    problem = None if hessian is None else _factorized(hessian, unit.options)
    together = 1 if problem is None else tile(ROWS_TOGETHER, problem.matrix.device)
    workers = 1 if problem is None else execution.workers
    parts = [(name, rows) for name, weight in weights.items() for rows in dealt_rows(len(weight), workers, together)]
    items = (weights[name][rows] for name, rows in parts)
    found = list(zip(parts, execution.map(_quantized_rows, items, unit.options, problem), strict=True))
    codes, errors = list[Codes](), list[float]()
    for option in range(len(unit.options)):
        own = {name: [each[option] for (other, _), each in found if other == name] for name in weights}
        codes.append({name: GroupQuantized.joined([rows for rows, _ in parts]) for name, parts in own.items()})
        errors.append(sum((total(torch.cat([energy for _, energy in parts])) for parts in own.values()), 0.0))
    return _SolvedUnit(codes, tuple(errors))


def _quantized_rows(
    weight: Tensor, options: Sequence[Options], problem: FactorizedHessian | None
) -> list[tuple[GroupQuantized, Tensor]]:
    """Rows of a layer with each option, on any worker.

    Returns:
        The codes, and the mean squares of what they change in each output, float64 [rows]; of layers that are rounded
        to nearest the sum of the squares of what they change in all weights, [1].
    """
    found = []
    for each in options:
        if problem is None:
            codes = round_to_nearest(weight, each)
            errors = codes.dequantize().sub_(weight).double().square().sum().reshape(1).cpu()
        else:
            rows, matrix = weight.to(problem.device), problem.matrix.to(problem.device)
            codes = solve(rows, matrix, problem.factor.to(problem.device), each)
            errors = row_energies(codes.dequantize().sub_(rows), matrix)
        found.append((codes, errors))
    return found


def _factorized(hessian: Hessian, options: Sequence[Options]) -> FactorizedHessian | None:
    """The Hessian with its factor, which does not depend on bits and groups; None if it cannot be factorized."""
    try:
        matrix = usable(hessian)
        factor = factorize(matrix, options[0], rank_deficient=hessian.tokens < len(matrix))
    except NumericalError:
        return None
    return FactorizedHessian(matrix, factor, str(matrix.device))
