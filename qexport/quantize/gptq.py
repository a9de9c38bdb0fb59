"""The method `gptq`: block by block, each layer solved with inputs from the quantized layers before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.architectures.freed_memory import return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError
from qexport.progress import Notice, Progress, Reporter, silent
from qexport.quantize.hessian import Hessian
from qexport.quantize.layer import SolvedLayer, solve_together
from qexport.quantize.parking import Parking
from qexport.quantize.pauses import PausedForward, pausing_at, shared_inputs
from qexport.quantize.selection import select
from qexport.quantize.settings import GptqSettings
from qexport.quantize.solver import Options
from qexport.tensors import CalibrationSet, Checkpoint, GroupQuantizedSpec, OutputSpec, TensorRecord

BATCH_TOKENS = 2048
"""Tokens that go through a block at a time."""

Linears = dict[str, nn.Module]


def output_specs(checkpoint: Checkpoint, structure: Structure, settings: GptqSettings) -> dict[str, OutputSpec]:
    """What `quantize` will yield, by parameter name.

    Raises:
        CompatibilityError: see `selection.select`.
    """
    specs: dict[str, OutputSpec] = dict(checkpoint.weights.specs())
    for module, options in select(structure, settings).items():
        out_features, in_features = structure.parameters[f"{module}.weight"]
        specs[f"{module}.weight"] = GroupQuantizedSpec(
            out_features=out_features,
            in_features=in_features,
            bits=options.bits,
            group_size=options.group_size,
            sym=options.sym,
            desc_act=options.order == "dynamic",
        )
    return specs


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    settings: GptqSettings,
    calibration: CalibrationSet,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
    report: Reporter = silent,
) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, the chosen linears quantized, with the memory of one block.

    Args:
        checkpoint: the merged model.
        settings: the recipe's `quantize`.
        calibration: the tokens to look at.
        dtype: the merged model's dtype, which the forward computes in.
        device: where to compute.
        scratch: a folder on a disk with room for a block's activations; nothing is left in it.
        report: is told of each block.

    Raises:
        NumericalError: a layer's Hessian is not finite or cannot be factorized, and `on_failure` is `error`.
        CompatibilityError: a block's forward does not call one of its layers.
        InputError: a tensor cannot be read.
        OSError: the disk is full.
    """
    runner = BlockRunner(checkpoint.config, checkpoint.weights, dtype=dtype, device=device)
    work = _Pass(runner, settings, calibration, scratch)
    tokens = calibration.input_ids.numel()
    total = len(runner.structure.blocks)
    report(Progress("quantize", 0, total, "block"))
    for name in _outside(checkpoint, runner.structure, work.chosen):
        yield TensorRecord(name, checkpoint.weights.read(name))
    for index in range(total):
        records = work.block(index)
        report(Progress("quantize", index + 1, total, "block", _summary(records), (index + 1) * tokens))
        yield from records
        _tell_fallbacks(records, report)
    if runner.structure.head in work.chosen:
        yield work.head()


def _outside(checkpoint: Checkpoint, structure: Structure, chosen: Mapping[str, Options]) -> list[str]:
    """The tensors that belong to no block and are not quantized."""
    blocks = tuple(f"{block}." for block in structure.blocks)
    return [
        name
        for name in checkpoint.weights.specs()
        if not name.startswith(blocks) and name.removesuffix(".weight") not in chosen
    ]


class _Pass:
    """One pass of the calibration tokens through the model."""

    def __init__(self, runner: BlockRunner, settings: GptqSettings, calibration: CalibrationSet, scratch: Path) -> None:
        self._runner, self._settings, self._parking = runner, settings, Parking(scratch)
        self.chosen = select(runner.structure, settings)
        length = calibration.input_ids.shape[1]
        self._batches = runner.embed(calibration.input_ids, max(1, BATCH_TOKENS // length))
        self._probe = runner.embed(calibration.input_ids[:1, :8], 1)[0]

    def block(self, index: int) -> list[TensorRecord]:
        """Quantizes one block and takes every batch through it."""
        prefix = f"{self._runner.structure.blocks[index]}."
        with self._runner.block(index) as block:
            linears = {
                linear.name: block.get_submodule(linear.name.removeprefix(prefix))
                for linear in self._runner.structure.linears[prefix[:-1]]
                if linear.name in self.chosen
            }
            solve = self._in_one_forward if self._settings.true_sequential else self._in_two_forwards
            solved = solve(index, block, linears)
            return [
                _record(f"{prefix}{name}", tensor, solved) for name, tensor in block.state_dict(keep_vars=True).items()
            ]

    def head(self) -> TensorRecord:
        """Quantizes the output head."""
        name = self._runner.structure.head
        with self._runner.head_inputs() as inputs:
            hessian = Hessian(self._runner.structure.parameters[f"{name}.weight"][1], self._runner.device)
            for batch in self._batches:
                hessian.add(inputs(batch.hidden))
        weight = self._runner.read(f"{name}.weight").to(torch.float32)
        solved = solve_together({name: weight}, hessian, self.chosen, self._settings.on_failure)
        return _record(f"{name}.weight", weight, solved)

    def _in_one_forward(self, index: int, block: nn.Module, linears: Linears) -> dict[str, SolvedLayer]:
        """Each batch's forward waits before each group of layers until the group is solved.

        The groups' inputs and the block's wait on the disk meanwhile: they would be most of the memory.
        """
        groups = self._groups(index, block, linears)
        forwards = [self._paused(index, block, batch) for batch in self._batches]
        solved: dict[str, SolvedLayer] = {}
        with pausing_at([linears[group[0]] for group in groups]):
            for group in groups:
                hessian = self._hessian(linears[group[0]])
                for forward, batch in zip(forwards, self._batches, strict=True):
                    inputs = forward.advance()
                    hessian.add(inputs)
                    forward.park(self._parking, (inputs, batch.hidden))
                return_freed_memory()
                solved |= self._solve({name: linears[name] for name in group}, hessian)
                return_freed_memory()
            for forward in forwards:
                forward.finish()
        self._parking.empty()
        return solved

    def _in_two_forwards(self, index: int, block: nn.Module, linears: Linears) -> dict[str, SolvedLayer]:
        """All layers are solved with inputs from the block's own weights; then the quantized block runs once more."""
        groups = self._groups(index, block, linears)
        hessians = [self._hessian(linears[group[0]]) for group in groups]
        with pausing_at([linears[group[0]] for group in groups]):
            for batch in self._batches:
                forward = self._paused(index, block, Batch(batch.hidden, batch.calls))
                for hessian in hessians:
                    hessian.add(forward.advance())
                forward.finish()
        solved: dict[str, SolvedLayer] = {}
        for group, hessian in zip(groups, hessians, strict=True):
            solved |= self._solve({name: linears[name] for name in group}, hessian)
        for batch in self._batches:
            self._runner.forward(index, block, batch)
        return solved

    def _groups(self, index: int, block: nn.Module, linears: Linears) -> list[list[str]]:
        probe = Batch(self._probe.hidden, self._probe.calls)
        groups = shared_inputs(linears, lambda: self._runner.forward(index, block, probe))
        if unreached := linears.keys() - {name for group in groups for name in group}:
            raise CompatibilityError(
                "the block's forward does not call these layers, so that nothing is known of their inputs",
                where=", ".join(sorted(unreached)),
                mend="leave them dense with quantize.overrides",
            )
        return groups

    def _paused(self, index: int, block: nn.Module, batch: Batch) -> PausedForward:
        return PausedForward(lambda: self._runner.forward(index, block, batch))

    def _hessian(self, linear: nn.Module) -> Hessian:
        return Hessian(_weight(linear).shape[1], self._runner.device)

    def _solve(self, linears: Linears, hessian: Hessian) -> dict[str, SolvedLayer]:
        """Solves a group and gives its layers the quantized weights."""
        weights = {name: _weight(linear).to(torch.float32) for name, linear in linears.items()}
        solved = solve_together(weights, hessian, self.chosen, self._settings.on_failure)
        for name, linear in linears.items():
            weight = _weight(linear)
            weight.data = solved[name].quantized.dequantize(weight.dtype)
        return solved


def _weight(linear: nn.Module) -> nn.Parameter:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _record(name: str, tensor: Tensor, solved: Mapping[str, SolvedLayer]) -> TensorRecord:
    layer = solved.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if layer is None:
        return TensorRecord(name, tensor.detach().cpu())
    return TensorRecord(name, layer.quantized.cpu(), layer.report)


def _summary(records: list[TensorRecord]) -> str:
    losses = [record.report.loss for record in records if record.report and record.report.loss is not None]
    return f"loss {max(losses):.4f}" if losses else "dense"


def _tell_fallbacks(records: list[TensorRecord], report: Reporter) -> None:
    for record in records:
        if record.report and record.report.method == "round_to_nearest":
            report(Notice(f"{record.report.name} was rounded to nearest: its Hessian could not be used"))
