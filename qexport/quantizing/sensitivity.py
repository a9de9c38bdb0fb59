"""How far the model's predictions move when a few of its layers are quantized, for many choices of layers at once.

With the weights W and a small change D of them, the divergence of the predictions of a window is, to second order,
`KL = E[<g, D>^2] / 2`, where g is the gradient of `sum_t log p(y_t)` with respect to W and every y_t is drawn from
the model's own prediction p: the curvature of KL is the Fisher information. One pass back through the blocks gives g of
every layer, so the effect of every layer at the head, through all blocks after it, costs as much as that of one.

D comes from GPTQ, with Hessians of other windows in the unquantized model. Experts are rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.devices import single_thread
from qexport.architectures.memory import return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.structure import LinearSpec
from qexport.errors import NumericalError
from qexport.progress import Progress, ProgressCallback
from qexport.quantizing.drawn_tokens import gradients_at_head
from qexport.quantizing.layer import Hessian, output_energy, usable
from qexport.quantizing.products import FixedProducts
from qexport.quantizing.solver import Factor, Options, factorize, round_to_nearest, solve

_BATCH_TOKENS: Final = 2048
"""Tokens that go forward through a block at a time. The last bits depend on it."""

_KEPT: Final = torch.bfloat16
"""Of the hidden states between the passes: there are those of every block."""


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
    progress: ProgressCallback,
) -> list[Effects]:
    """What every unit and option does to the predictions.

    Computed in float32, with the same bits for any number of threads. In memory there are the weights of one block with
    a change of them for each option, and the hidden states of all windows before every block.

    Args:
        checkpoint: the merged model.
        units: in any order.
        input_ids: int64 [windows, tokens], where the predictions are looked at.
        hessian_ids: int64 [other windows, tokens], for the Hessians. On the windows that they were fitted to, the codes
            would look better than they are: by a third on SmolLM2 with 4,096 tokens.
        device: where to compute.
        progress: is called with each block.

    Returns:
        Of each unit.

    Raises:
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
    """
    architecture = checkpoint.architecture.in_dtype(torch.float32)
    runner = BlockRunner(architecture, checkpoint.weights, dtype=torch.float32, device=device)
    blocks, linears = runner.structure.blocks, runner.structure.linears
    windows = runner.embed(input_ids, 1)
    batches = runner.embed(hessian_ids, max(1, _BATCH_TOKENS // hessian_ids.shape[1]))
    inputs = []
    for index in range(len(blocks)):
        inputs.append([each.hidden.to(_KEPT) for each in (*windows, *batches)])
        with runner.block(index) as block, FixedProducts():
            for batch in windows if index + 1 == len(blocks) else [*windows, *batches]:
                runner.forward(index, block, batch)
        progress(Progress("calibrate", index + 1, 2 * len(blocks), "block", "forward"))
    upstream = gradients_at_head(runner, [window.hidden for window in windows])
    found: dict[int, Effects] = {}
    for index in reversed(range(len(blocks))):
        own = {number: unit for number, unit in enumerate(units) if unit.layers[0] in linears[blocks[index]]}
        for batch, hidden in zip((*windows, *batches), inputs.pop(), strict=True):
            batch.hidden = hidden.to(runner.dtype)
        with runner.block(index) as block:
            changes = _changes(runner, index, block, batches, list(own.values()))
            products = _backward(runner, index, block, windows, upstream, changes)
        for number, each, options in zip(own, products, changes, strict=True):
            found[number] = Effects(each, tuple(change.error for change in options), input_ids.shape[1])
        return_freed_memory()
        progress(Progress("calibrate", 2 * len(blocks) - index, 2 * len(blocks), "block", "back"))
    return [found[number] for number in range(len(units))]


@dataclass(frozen=True)
class _Change:
    """What an option changes: the weights by their names, in the shapes of files, and the error of the outputs."""

    weights: Mapping[str, Tensor]
    error: float


Changes = Sequence[Sequence[_Change]]
"""For each unit and option."""


def _backward(
    runner: BlockRunner,
    index: int,
    block: nn.Module,
    windows: Sequence[Batch],
    upstream: list[Tensor],
    changes: Changes,
) -> list[Tensor]:
    """The products of each unit; `upstream` is replaced by the gradients with respect to the block's input."""
    names = list(dict.fromkeys(name for unit in changes for option in unit for name in option.weights))
    products = [torch.zeros(len(windows), len(unit), dtype=torch.float64) for unit in changes]

    for number, window in enumerate(windows):
        with FixedProducts():
            upstream[number], of_weights = runner.gradients(index, block, window, upstream[number], names)
        with single_thread():
            for unit, options in zip(products, changes, strict=True):
                for column, change in enumerate(options):
                    unit[number, column] = sum(
                        _product(of_weights[name], each) for name, each in change.weights.items()
                    )
    return products


def _product(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))


def _changes(
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[Batch], units: Sequence[Unit]
) -> Changes:
    """What quantizing changes in each unit's weights, with each of its options."""
    shared = {number: unit for number, unit in enumerate(units) if not unit.layers[0].expert}
    hessians = _hessians(runner, index, block, batches, list(shared.values()))
    of_unit = dict(zip(shared, hessians, strict=True))
    return [list(_of_options(runner, unit, of_unit.pop(number, None))) for number, unit in enumerate(units)]


def _hessians(
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[Batch], units: Sequence[Unit]
) -> list[Hessian]:
    """Of the inputs of each unit's layers, in all windows."""
    hessians = [Hessian(unit.layers[0].in_features, runner.device) for unit in units]

    def add(hessian: Hessian, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        hessian.add(args[0])

    modules = [runner.module(unit.layers[0]) for unit in units]
    hooks = [
        module.register_forward_pre_hook(partial(add, hessian))
        for module, hessian in zip(modules, hessians, strict=True)
    ]
    try:
        for batch in batches:
            with FixedProducts():
                runner.forward(index, block, Batch(batch.hidden, batch.calls))
    finally:
        for hook in hooks:
            hook.remove()
    return hessians


def _of_options(runner: BlockRunner, unit: Unit, hessian: Hessian | None) -> Iterator[_Change]:
    matrices = {linear.name: _matrix(runner, linear) for linear in unit.layers}
    solver = None if hessian is None else _solver(hessian, unit.options)
    for options in unit.options:
        weights, error = {}, 0.0
        for linear in unit.layers:
            weight = matrices[linear.name]
            found = round_to_nearest(weight, options) if solver is None else solve(weight, *solver, options)
            difference = found.dequantize().sub_(weight)
            error += output_energy(difference, solver[0]) if solver else float(difference.double().square().sum())
            weights[f"{linear.name}.weight"] = difference.t() if linear.transposed else difference
        yield _Change(weights, error)


def _matrix(runner: BlockRunner, linear: LinearSpec) -> Tensor:
    weight = runner.parameter(f"{linear.name}.weight").detach()
    return (weight.t() if linear.transposed else weight).contiguous()


def _solver(hessian: Hessian, options: Sequence[Options]) -> tuple[Tensor, Factor] | None:
    """The Hessian with its factor, which does not depend on bits and groups; None if it cannot be factorized."""
    try:
        matrix = usable(hessian)
        return matrix, factorize(matrix, options[0], rank_deficient=hessian.tokens < len(matrix))
    except NumericalError:
        return None
