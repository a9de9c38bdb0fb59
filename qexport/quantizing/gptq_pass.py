"""The pass of GPTQ: block by block, each layer solved with inputs from the quantized layers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.memory import budget, return_freed_memory
from qexport.architectures.sending import Sender, sends
from qexport.architectures.structure import Structure
from qexport.execution.workers import Value, WorkerLostError, begun_anew
from qexport.formats import Outputs
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.importance import kept_importance, token_weights
from qexport.quantizing.layer import Hessian, SolvedLayer, is_corrected, solve_together
from qexport.quantizing.method import PassInputs
from qexport.quantizing.selection import candidates, notes_on_experts, select, solver_options
from qexport.quantizing.shard import GroupNames, SharedInputs, WindowShard
from qexport.quantizing.shards import Shards, shared_out
from qexport.quantizing.solver import Options
from qexport.tensors import GroupQuantizedSpec, OutputSpec, TensorRecord

BATCH_TOKENS = 1024
"""Tokens that go through a block at a time. It is the same whatever memory there is: the bits of the Hessians' sums
depend on it."""

HESSIAN_BYTES = 1 << 30
"""Bytes for the Hessians of a mixture's experts that are summed at the same time, each [in, in] in float32."""


def corrects(method: Gptq, windows: int, length: int) -> bool:
    """Whether layers make up for the quantized ones before them, on so many windows of so many tokens.

    Two halves of the text are compared, so there must be two batches.
    """
    return method.gptaq_alpha > 0 and windows > max(1, BATCH_TOKENS // length)


def plan(method: Gptq, checkpoint: Checkpoint) -> Outputs:
    """What `quantize` will yield."""
    structure = checkpoint.architecture.structure
    specs: dict[str, OutputSpec] = dict(checkpoint.weights.specs())
    linears = candidates(structure, method)
    for name, options in select(structure, method).items():
        specs[f"{name}.weight"] = GroupQuantizedSpec(
            out_features=linears[name].out_features,
            in_features=linears[name].in_features,
            bits=options.bits,
            group_size=options.group_size,
            sym=options.sym,
            desc_act=options.order == "dynamic",
        )
    return Outputs(method.format(), specs, notes_on_experts(structure, specs, method))


@torch.no_grad()
def quantize(method: Gptq, inputs: PassInputs, make: Callable[..., BlockPass] | None = None) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, the chosen linears quantized, with the memory of one block.

    A block is a unit, and so is the head if it is quantized. The tensors outside the blocks come with the first block.

    Args:
        method: the recipe's `quantize`.
        inputs: the model and its calibration tokens, and where to begin.
        make: makes a subclass of `BlockPass`, for methods that find the codes of a layer in another way.

    Raises:
        NumericalError: a layer's Hessian is not finite or cannot be factorized, and `on_failure` is `error`.
        CompatibilityError: a block's forward does not call one of its layers.
        InputError: a tensor cannot be read.
        ResourceError: the activations of an earlier run are damaged.
        OSError: the disk is full.
    """
    checkpoint, progress, chosen = inputs.checkpoint, inputs.progress, _options(method, inputs.outputs)
    structure, first = checkpoint.architecture.structure, inputs.finished_units
    blocks, with_head = len(structure.blocks), structure.head in chosen
    units = blocks + with_head
    progress(Progress("quantize", min(first, blocks), blocks, "block"))
    if first == units:
        return
    with closing((make or BlockPass)(method, chosen, inputs, _importance(method, chosen, inputs))) as work:
        work.start(first)
        if first == 0:
            for name in _outside(checkpoint, structure, chosen):
                yield TensorRecord(name, checkpoint.weights.read(name))
        for index in range(first, blocks):
            records = work.block(index)
            yield from records
            work.finish(index + 1, last=index + 1 == units)
            progress(Progress("quantize", index + 1, blocks, "block", _summary(records), (index + 1) * work.tokens))
            _notify_fallbacks(records, progress)
        if with_head:
            yield work.head()
            work.finish(units, last=True)


def _importance(method: Gptq, chosen: Mapping[str, Options], inputs: PassInputs) -> dict[str, Tensor] | None:
    """Of the layers in blocks that are no experts, with `effort: high`."""
    if method.effort != "high":
        return None
    linears = inputs.checkpoint.architecture.structure.block_linears
    return kept_importance(inputs, [each.name for each in linears if each.name in chosen and not each.expert])


def _options(method: Gptq, outputs: Outputs) -> dict[str, Options]:
    """The solver's options for each layer that `outputs` quantizes."""
    options = {}
    for name, spec in outputs.quantized.items():
        assert isinstance(spec, GroupQuantizedSpec)
        options[name] = solver_options(method, spec.bits, spec.group_size)
    return options


def _outside(checkpoint: Checkpoint, structure: Structure, chosen: Mapping[str, Options]) -> list[str]:
    """The tensors that belong to no block and are not quantized."""
    return [
        name
        for name in checkpoint.weights.specs()
        if not structure.in_blocks(name) and name.removesuffix(".weight") not in chosen
    ]


class BlockPass:
    """One pass of the calibration tokens through the model: shards of them go through the blocks, and this solves."""

    def __init__(
        self, method: Gptq, chosen: Mapping[str, Options], inputs: PassInputs, importance: Mapping[str, Tensor] | None
    ) -> None:
        architecture, calibration, execution = inputs.checkpoint.architecture, inputs.calibration, inputs.execution
        assert calibration is not None, "a run reads the text of every method that needs calibration"
        self._method, self._chosen, self._inputs, self._importance = method, chosen, inputs, importance
        device = torch.device(inputs.device.type) if execution.apart else inputs.device  # a worker sees its own only
        self._structure, self._linears = architecture.structure, candidates(architecture.structure, method)
        windows, length = calibration.input_ids.shape
        self.tokens, size = calibration.input_ids.numel(), max(1, BATCH_TOKENS // length)
        self._corrected = corrects(method, windows, length) and any(map(is_corrected, chosen.values()))
        ranges = shared_out(-(-windows // size), execution.workers)
        shared = SharedInputs(
            architecture=architecture,
            weights=None if sends(execution, device) else inputs.checkpoint.weights,
            linears=self._linears,
            chosen=frozenset(chosen),
            input_ids=calibration.input_ids,
            batch_size=size,
            corrected=self._corrected,
            alpha=method.gptaq_alpha,
            alone=len(ranges) == 1,
            once=method.true_sequential,
            expert_hessians=int(min(HESSIAN_BYTES, budget().expert_hessians)),
            dtype=inputs.dtype,
            device=str(device),
            scratch=inputs.scratch,
            kept=inputs.resume.folder if inputs.resume else None,
        )
        self._sender = Sender(inputs.checkpoint.weights, architecture.structure, execution, device)
        self._shards = Shards(execution, shared, ranges, device)

    def start(self, blocks: int) -> None:
        """Takes the text to the block after some finished ones."""
        self._shards.each(WindowShard.start, blocks, self._sender.outside())

    def close(self) -> None:
        """Frees what the shards hold."""
        self._sender.close()
        with suppress(WorkerLostError):
            self._shards.each(WindowShard.close)

    def finish(self, units: int, *, last: bool) -> None:
        """Makes it possible to go on after this number of units."""
        if self._inputs.resume is not None:
            self._inputs.resume.finished(lambda: () if last else [*set(self._shards.each(WindowShard.kept, units))])

    def block(self, index: int) -> list[TensorRecord]:
        """Quantizes one block and takes every batch through it. If a worker goes meanwhile, all begin the block anew.

        Raises:
            WorkerLostError: workers went in each attempt.
        """

        def renew(error: WorkerLostError) -> None:
            if self._inputs.resume is None and index > 0:
                raise error
            self._inputs.progress(Notice(f"{error.what}; block {index} begins anew"))
            self._shards.renew()
            self.start(index)

        return begun_anew(partial(self._block, index), renew)

    def _block(self, index: int) -> list[TensorRecord]:
        names = self._structure.parameters_of(self._structure.blocks[index])
        solved, late = dict[str, SolvedLayer](), dict[str, Tensor]()
        for number, group in enumerate(self._shards.each(WindowShard.begin, index, self._sender.block(index))[0]):
            found = self._solved(number, group)
            quantized = {name: layer.weight(self._inputs.dtype) for name, layer in found.items()}
            if self._method.true_sequential:
                self._shards.each(WindowShard.replace, self._once(quantized))
            else:
                late |= quantized
            solved |= found
            return_freed_memory()
        tensors = self._shards.first(WindowShard.parameters, [name for name in names if _layer(name) not in solved])
        self._shards.each(WindowShard.end, self._once(late))
        return self._records(names, tensors, solved)

    def head(self) -> TensorRecord:
        """Quantizes the output head."""
        (group,) = self._shards.each(WindowShard.begin_head, self._sender.outside())[0]
        [record] = self._records([f"{self._structure.head}.weight"], {}, self._solved(0, group))
        return record

    def _once(self, value: Value) -> Value:
        return self._inputs.execution.once(value).argument

    def _solved(self, number: int, group: GroupNames) -> dict[str, SolvedLayer]:
        """Solves the layers of a group. Each sum is freed after its use."""
        names = group.members[0]
        corrected = self._corrected and not group.experts and any(is_corrected(self._chosen[name]) for name in names)
        widths = [self._linears[each[0]].in_features for each in group.members]
        counts = self._token_weights(group)
        hessians, halves = self._shards.summed(number, widths, counts, names if corrected else ())
        return_freed_memory()
        if len(group.members) == 1:
            weights = self._shards.first(WindowShard.weights, names)
            halved = {name: (halves[0].pop(name), halves[1].pop(name)) for name in weights} if corrected else None
            return self._solved_together(weights, hessians.pop(), halved)
        problems = ((self._shards.first(WindowShard.weights, each), hessians.pop(0)) for each in group.members)
        found = self._inputs.execution.map(self.solved_alone, problems, self._chosen, self._method.on_failure)
        return {name: layer for of_one in found for name, layer in of_one.items()}

    def _solved_together(
        self, weights: Mapping[str, Tensor], hessian: Hessian, halves: dict[str, tuple[Tensor, Tensor]] | None
    ) -> dict[str, SolvedLayer]:
        """Solves layers that share an input; see `solve_together`."""
        return solve_together(weights, hessian, self._chosen, self._method.on_failure, halves, self._inputs.execution)

    @staticmethod
    def solved_alone(
        problem: tuple[Mapping[str, Tensor], Hessian],
        options: Mapping[str, Options],
        on_failure: Literal["error", "round_to_nearest"],
    ) -> dict[str, SolvedLayer]:
        """Solves layers of one expert, on any worker."""
        return solve_together(*problem, options, on_failure)

    def _records(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], solved: Mapping[str, SolvedLayer]
    ) -> list[TensorRecord]:
        """A block's parameters as they are stored: its unquantized tensors, and the layers that were solved."""
        return [_record(name, tensors.get(name), solved) for name in names]

    def _token_weights(self, group: GroupNames) -> Tensor | None:
        """How much each token counts for a group, float32 [windows, tokens]; None for all alike."""
        if self._importance is None or group.experts:
            return None
        (names,) = group.members
        return token_weights(self._importance, names)


def _layer(name: str) -> str:
    """The layer whose weight a tensor is; its own name if it is no weight."""
    return name.removesuffix(".weight")


def _record(name: str, tensor: Tensor | None, solved: Mapping[str, SolvedLayer]) -> TensorRecord:
    if tensor is not None:
        return TensorRecord(name, tensor.detach().cpu())
    layer = solved[_layer(name)]
    return TensorRecord(name, layer.quantized.cpu(), layer.record)


def _summary(records: list[TensorRecord]) -> str:
    losses = [record.layer.loss for record in records if record.layer and record.layer.loss is not None]
    return f"loss {max(losses):.4f}" if losses else "unquantized"


def _notify_fallbacks(records: list[TensorRecord], progress: ProgressCallback) -> None:
    for record in records:
        if record.layer and record.layer.method == "round_to_nearest":
            progress(Notice(f"{record.layer.name} was rounded to nearest: its Hessian could not be used"))
