"""The pass of GPTQ: block by block, each layer solved with inputs from the quantized layers before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.families import ExpertStop, staged
from qexport.architectures.memory import budget, return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.structure import LinearSpec, Structure
from qexport.artifact.disk import sync
from qexport.errors import CompatibilityError
from qexport.formats import Outputs
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.quantizing.activations import HiddenStates, OffloadFile
from qexport.quantizing.asymmetry import Asymmetry
from qexport.quantizing.full_precision import FullPrecisionStream
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.importance import token_importance, token_weights
from qexport.quantizing.layer import Hessian, SolvedLayer, is_corrected, solve_together
from qexport.quantizing.method import PassInputs
from qexport.quantizing.parking import Parking
from qexport.quantizing.pauses import Group, PausedForward, find_groups, pausing_at
from qexport.quantizing.products import FixedProducts
from qexport.quantizing.selection import candidates, notes_on_experts, select, solver_options
from qexport.quantizing.solver import Options
from qexport.quantizing.stream import Stream
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
def quantize(method: Gptq, inputs: PassInputs) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, the chosen linears quantized, with the memory of one block.

    A block is a unit, and so is the head if it is quantized. The tensors outside the blocks come with the first block.

    Args:
        method: the recipe's `quantize`.
        inputs: the model and its calibration tokens, and where to begin.

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
    with _passing(method, chosen, inputs, _importance(method, chosen, inputs)) as work:
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


@contextmanager
def _passing(
    method: Gptq, chosen: Mapping[str, Options], inputs: PassInputs, importance: Mapping[str, Tensor] | None
) -> Iterator[_Pass]:
    """A pass that begins with the hidden states before the first block that is not finished."""
    with ExitStack() as stack:
        offload_file = stack.enter_context(OffloadFile(inputs.scratch))
        folder = inputs.resume.folder if inputs.resume else inputs.scratch
        states = stack.enter_context(HiddenStates(folder, kept=inputs.resume is not None))
        yield _Pass(method, chosen, inputs, offload_file, states, importance)


def _importance(method: Gptq, chosen: Mapping[str, Options], inputs: PassInputs) -> dict[str, Tensor] | None:
    """Of the layers in blocks that are no experts, with `effort: high`; an earlier run may have left it."""
    if method.effort != "high":
        return None
    assert inputs.calibration is not None
    kept = inputs.resume and inputs.resume.folder / "importance.safetensors"
    if kept and kept.exists():
        return load_file(kept)
    linears = inputs.checkpoint.architecture.structure.block_linears
    found = token_importance(
        inputs.checkpoint,
        [linear.name for linear in linears if linear.name in chosen and not linear.expert],
        inputs.calibration.input_ids,
        dtype=inputs.dtype,
        device=inputs.device,
        scratch=inputs.scratch,
        progress=inputs.progress,
    )
    if kept:
        _write(kept, found)
    return found


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file beside its path, then renames it: one that is there is whole.

    Raises:
        OSError: the disk is full, of which safetensors itself would raise an error of its own.
    """
    beside = path.with_suffix(".partial")
    beside.write_bytes(save(dict(tensors)))
    sync(beside)
    beside.replace(path)


def _options(method: Gptq, outputs: Outputs) -> dict[str, Options]:
    """The solver's options for each layer that `outputs` quantizes."""
    options = {}
    for name, spec in outputs.quantized.items():
        assert isinstance(spec, GroupQuantizedSpec)
        options[name] = solver_options(method, spec.bits, spec.group_size)
    return options


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

    def __init__(
        self,
        method: Gptq,
        chosen: Mapping[str, Options],
        inputs: PassInputs,
        offload_file: OffloadFile,
        states: HiddenStates,
        importance: Mapping[str, Tensor] | None,
    ) -> None:
        checkpoint, calibration = inputs.checkpoint, inputs.calibration
        assert calibration is not None, "a run reads the text of every method that needs calibration"
        runner = BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=inputs.dtype, device=inputs.device)
        self._runner, self._method, self._resume = runner, method, inputs.resume
        self._offload_file, self._importance = offload_file, importance
        self._chosen, self._linears = chosen, candidates(runner.structure, method)
        self.tokens, length = calibration.input_ids.numel(), calibration.input_ids.shape[1]
        corrected = corrects(method, *calibration.input_ids.shape) and any(map(is_corrected, chosen.values()))
        parts = calibration.input_ids.split(max(1, BATCH_TOKENS // length))
        self._states, self._stream = states, Stream(states, 0)
        self._full = FullPrecisionStream(runner, Stream(states, len(parts)), offload_file) if corrected else None
        embedded = runner.embedded([calibration.input_ids[:1, :8], *parts])
        self._probe = next(embedded)
        self._begin(embedded, inputs.finished_units)

    def _begin(self, embedded: Iterator[Batch], blocks: int) -> None:
        """Takes the batches before the first block, or with what an earlier run has left after some."""
        streams = [self._stream, *([self._full.stream] if self._full else [])]
        for batch in embedded:
            for stream in streams:
                own = Batch(batch.hidden.clone(), batch.calls)
                stream.add_empty(own) if blocks else stream.add(own)
        if not blocks:
            return
        restores = self._states.read(blocks, [batch.hidden for stream in streams for batch in stream.batches])
        for number, stream in enumerate(streams):
            count = len(stream.batches)
            stream.take_over(restores[number * count : (number + 1) * count])

    def finish(self, units: int, *, last: bool) -> None:
        """Makes it possible to go on after this number of units."""
        if self._resume is not None:
            self._resume.finished(lambda: () if last else [self._states.finish(units)])

    def block(self, index: int) -> list[TensorRecord]:
        """Quantizes one block and takes every batch through it."""
        name = self._runner.structure.blocks[index]
        chosen = [linear for linear in self._runner.structure.linears[name] if linear.name in self._chosen]
        with self._runner.block(index) as block, self._stops(chosen) as of_experts:
            groups = self._groups(index, block, chosen, of_experts)
            if self._full is not None:
                self._full.run(index, block, groups)
            solve = self._in_one_forward if self._method.true_sequential else self._in_two_forwards
            solved = solve(index, block, groups)
            self._offload_file.empty()
            names = [parameter for parameter in self._runner.structure.parameters if parameter.startswith(f"{name}.")]
            return [_record(parameter, self._runner.parameter(parameter), solved) for parameter in names]

    @contextmanager
    def _stops(self, chosen: Sequence[LinearSpec]) -> Iterator[list[Group]]:
        """Makes the block's experts stop before their matrix products, and yields the groups of the chosen ones."""
        experts = [linear for linear in chosen if linear.expert]
        with ExitStack() as stack:
            groups = []
            for module in dict.fromkeys(self._runner.module(linear) for linear in experts):
                of_module = [linear for linear in experts if self._runner.module(linear) is module]
                square_bytes = int(min(HESSIAN_BYTES, budget().expert_hessians))
                for stop in stack.enter_context(staged(module, square_bytes)):
                    groups += self._of_experts(stop, of_module)
            yield groups

    def _of_experts(self, stop: ExpertStop, linears: Sequence[LinearSpec]) -> list[Group]:
        """The layers whose inputs a stop receives, as one group; no group if none of them is to be quantized."""
        by_expert: dict[int, list[str]] = {}
        for linear in linears:
            part = self._runner.part(linear)
            if part.expert is not None and part.expert in stop.experts and _leaf(part.parameter) == stop.parameter:
                by_expert.setdefault(part.expert, []).append(linear.name)
        return [Group(stop, tuple(map(tuple, by_expert.values())), tuple(by_expert))] if by_expert else []

    def head(self) -> TensorRecord:
        """Quantizes the output head."""
        name = self._runner.structure.head
        weights = {name: self._runner.read(f"{name}.weight").to(torch.float32)}
        with self._runner.head_inputs() as inputs:
            sums = self._sums(((name,),))
            for number in range(len(self._stream.batches)):
                with ExitStack() as stack:
                    hidden = stack.enter_context(self._stream.restored(number))
                    full = stack.enter_context(self._full.stream.restored(number)) if self._full else None
                    sums.add([inputs(hidden)], None if full is None else inputs(full))
                if number == self._middle:
                    sums.take(weights)
        corrections = sums.corrections(weights)
        solved = solve_together(weights, sums.hessians.pop(), self._chosen, self._method.on_failure, corrections)
        return _record(f"{name}.weight", weights[name], solved)

    def _in_one_forward(self, index: int, block: nn.Module, groups: Sequence[Group]) -> dict[str, SolvedLayer]:
        """Each batch's forward waits before each group of layers until the group is solved.

        Until then all that it holds is on the disk: it would take most of the memory.
        """
        parking = self._parking()
        forwards = [self._paused(index, block, batch, parking) for batch in self._stream.batches]
        solved: dict[str, SolvedLayer] = {}
        with pausing_at([group.stop for group in groups]):
            for group in groups:
                sums = self._sums(group.members, experts=group.experts is not None)
                weights = self._token_weights(group)
                for number, forward in enumerate(forwards):
                    args = forward.advance()
                    sums.add(
                        group.inputs(args),
                        self._full_inputs(group, number),
                        None if weights is None else weights[number],
                    )
                    del args
                    parking.park()
                    if number == self._middle:
                        sums.take(self._weights(group.members[0]))
                return_freed_memory()
                solved |= self._solve(group, sums)
                return_freed_memory()
            for number, forward in enumerate(forwards):
                forward.finish()
                self._stream.offload(index + 1, number)
        return solved

    def _in_two_forwards(self, index: int, block: nn.Module, groups: Sequence[Group]) -> dict[str, SolvedLayer]:
        """All layers are solved with inputs from the block's own weights; then the quantized block runs once more."""
        sums = [self._sums(group.members, experts=group.experts is not None) for group in groups]
        weights = [self._token_weights(group) for group in groups]
        with pausing_at([group.stop for group in groups]):
            parking = self._parking()
            for number, batch in enumerate(self._stream.batches):
                forward = self._paused(index, block, Batch(batch.hidden, batch.calls), parking)
                for group, of_group, own in zip(groups, sums, weights, strict=True):
                    full = self._full_inputs(group, number)
                    of_group.add(group.inputs(forward.advance()), full, None if own is None else own[number])
                    if number == self._middle:
                        of_group.take(self._weights(group.members[0]))
                forward.finish()
                del forward
                parking.park()
        solved: dict[str, SolvedLayer] = {}
        for group, of_group in zip(groups, sums, strict=True):
            solved |= self._solve(group, of_group)
        for number, batch in enumerate(self._stream.batches):
            self._stream.restore(number)
            with FixedProducts():
                self._runner.forward(index, block, batch)
            self._stream.offload(index + 1, number)
        return solved

    def _groups(
        self, index: int, block: nn.Module, chosen: Sequence[LinearSpec], of_experts: Sequence[Group]
    ) -> list[Group]:
        probe = Batch(self._probe.hidden, self._probe.calls)
        layers = {linear.name: self._runner.module(linear) for linear in chosen if not linear.expert}
        groups = find_groups(layers, of_experts, lambda: self._runner.forward(index, block, probe))
        reached = {name for group in groups for names in group.members for name in names}
        if unreached := {linear.name for linear in chosen} - reached:
            raise CompatibilityError(
                "the block's forward does not call these layers, so their inputs are unknown",
                where=", ".join(sorted(unreached)),
                mend="keep them at 16 bits: set dense: true for them in quantize.overrides",
            )
        return groups

    def _paused(self, index: int, block: nn.Module, batch: Batch, parking: Parking) -> PausedForward:
        return PausedForward(lambda: self._runner.forward(index, block, batch), parking)

    def _parking(self) -> Parking:
        """For the forwards of a block, whose inputs are on the disk."""
        parking = Parking(self._offload_file)
        for number in range(len(self._stream.batches)):
            parking.hold(*self._stream.restorer(number))
        return parking

    def _token_weights(self, group: Group) -> list[Tensor] | None:
        """How much each token counts for a group, float32 [tokens] of each batch; None for all alike."""
        if self._importance is None or group.experts is not None:
            return None
        (names,) = group.members
        weights = token_weights(self._importance, names).to(self._runner.device)
        return [part.flatten() for part in weights.split([len(batch.hidden) for batch in self._stream.batches])]

    def _full_inputs(self, group: Group, number: int) -> Tensor | None:
        return None if self._full is None else self._full.inputs(group, number)

    def _sums(self, members: Sequence[tuple[str, ...]], *, experts: bool = False) -> _Sums:
        """Sums for layers that share inputs, one tuple for each input."""
        widths = [self._linears[names[0]].in_features for names in members]
        corrected = any(is_corrected(self._chosen[name]) for name in members[0])
        asymmetric = self._full is not None and not experts and corrected
        return _Sums(
            [Hessian(width, self._runner.device) for width in widths],
            Asymmetry(widths[0], self._runner.device) if asymmetric else None,
            self._method.gptaq_alpha,
        )

    @property
    def _middle(self) -> int:
        """The last batch of the first half."""
        return len(self._stream.batches) // 2 - 1

    def _solve(self, group: Group, sums: _Sums) -> dict[str, SolvedLayer]:
        """Solves a group and writes the quantized weights into its layers. Each sum is freed after its use."""
        solved: dict[str, SolvedLayer] = {}
        for names in group.members:
            weights, on_failure = self._weights(names), self._method.on_failure
            corrections = sums.corrections(weights)
            solved |= solve_together(weights, sums.hessians.pop(0), self._chosen, on_failure, corrections)
            for name in names:
                matrix = self._matrix(name)
                matrix.copy_(solved[name].quantized.dequantize(matrix.dtype))
        return solved

    def _weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Loaded layers' weights, contiguous float32 [out, in]: a view where they are that already."""
        return {name: self._matrix(name).to(torch.float32).contiguous() for name in names}

    def _matrix(self, name: str) -> Tensor:
        """A loaded layer's weight [out, in], as a view of the parameter in memory."""
        weight = self._runner.parameter(f"{name}.weight")
        return weight.t() if self._linears[name].transposed else weight


@dataclass
class _Sums:
    """What is summed over the batches for a group of layers.

    Attributes:
        hessians: one for each input of the group.
        asymmetry: what quantizing has done to the one input of a group that is not of experts.
        alpha: the share of it that is to be made up for.
        first: of each weight, what the first half of the batches gives.
    """

    hessians: list[Hessian]
    asymmetry: Asymmetry | None
    alpha: float
    first: dict[str, Tensor] = field(default_factory=dict)

    def add(self, inputs: Sequence[Tensor], full: Tensor | None, weights: Tensor | None = None) -> None:
        """Adds a batch of the inputs, and of the first one before quantizing, if that is known; see `Hessian.add`."""
        for hessian, tensor in zip(self.hessians, inputs, strict=True):
            hessian.add(tensor, weights)
        if self.asymmetry is not None and full is not None:
            self.asymmetry.add(full, inputs[0], weights)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Ends the first half of the batches."""
        if self.asymmetry is not None:
            self.first = self.asymmetry.take(weights, self.alpha)

    def corrections(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Of each weight, what both halves give. The asymmetry is freed: it is as large as the Hessian."""
        if self.asymmetry is None:
            return None
        second, self.asymmetry = self.asymmetry.take(weights, self.alpha), None
        return {name: (self.first.pop(name), second[name]) for name in weights}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _record(name: str, tensor: Tensor, solved: Mapping[str, SolvedLayer]) -> TensorRecord:
    layer = solved.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if layer is None:
        return TensorRecord(name, tensor.detach().cpu())
    return TensorRecord(name, layer.quantized.cpu(), layer.record)


def _summary(records: list[TensorRecord]) -> str:
    losses = [record.layer.loss for record in records if record.layer and record.layer.loss is not None]
    return f"loss {max(losses):.4f}" if losses else "unquantized"


def _notify_fallbacks(records: list[TensorRecord], progress: ProgressCallback) -> None:
    for record in records:
        if record.layer and record.layer.method == "round_to_nearest":
            progress(Notice(f"{record.layer.name} was rounded to nearest: its Hessian could not be used"))
