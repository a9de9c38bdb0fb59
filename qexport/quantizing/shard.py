"""Some of the calibration windows on their way through the blocks, on one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.architectures.architecture import Architecture
from qexport.architectures.devices import reproducible
from qexport.architectures.families import ExpertStop, staged
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.sending import ReceivedWeights, Tensors
from qexport.architectures.structure import LinearSpec
from qexport.artifact.disk import sync
from qexport.errors import CompatibilityError, ResourceError
from qexport.quantizing.activations import StateFiles
from qexport.quantizing.full_precision import FullPrecisionStream
from qexport.quantizing.offloading import offload_on
from qexport.quantizing.parking import Parking
from qexport.quantizing.pauses import Group, PausedForward, find_groups, pausing_at
from qexport.quantizing.products import FixedProducts
from qexport.quantizing.stream import Stream
from qexport.quantizing.sums import GroupInputs, GroupSums
from qexport.tensors import WeightSource


@dataclass(frozen=True)
class SharedInputs:
    """What the forwards of all shards of a pass have in common.

    Attributes:
        architecture: of the model.
        weights: the merged model; None where its tensors are sent.
        linears: the layers that may be quantized.
        chosen: the names of those that are.
        input_ids: int64 [windows, tokens], of all shards.
        batch_size: windows that go through a block at a time.
        corrected: whether the text also goes through the model before quantizing.
        alpha: the share of what quantizing has done to the inputs that layers make up for.
        alone: whether one shard has all windows. Then what its forwards wait for is on the disk meanwhile; else the
            inputs of a group's layers stay in memory until it is solved, since they are used several times.
        once: whether each layer is solved with inputs from the quantized layers before it in its block, so that one
            forward is enough.
        expert_hessians: bytes for the Hessians of a mixture's experts that are summed at the same time.
        dtype: which a forward computes in.
        device: where to compute, by its name.
        scratch: a folder on a disk with room for a block's activations.
        kept: a folder for the hidden states after each block, the same for all shards; None to keep none.
    """

    architecture: Architecture
    weights: WeightSource | None
    linears: Mapping[str, LinearSpec]
    chosen: frozenset[str]
    input_ids: Tensor
    batch_size: int
    corrected: bool
    alpha: float
    alone: bool
    once: bool
    expert_hessians: int
    dtype: torch.dtype
    device: str
    scratch: Path
    kept: Path | None


@dataclass(frozen=True)
class GroupNames:
    """Layers that are solved together.

    Attributes:
        members: the names of the layers that share an input, one tuple for each input.
        experts: whether they are of experts.
    """

    members: tuple[tuple[str, ...], ...]
    experts: bool


class WindowShard:
    """Consecutive calibration batches, and the block that they are at.

    Args:
        shared: what all shards have in common.
        batches: the numbers of its batches.
    """

    def __init__(self, shared: SharedInputs, batches: range) -> None:
        self._shared, self._numbers = shared, batches
        self._received = ReceivedWeights()
        source = self._received if shared.weights is None else shared.weights
        self._device = torch.device(shared.device)
        self._runner = BlockRunner(shared.architecture, source, dtype=shared.dtype, device=self._device)
        if not shared.scratch.is_dir():
            raise ResourceError(
                "a worker does not see the output's folder",
                where=str(shared.scratch),
                mend="use a folder that all machines of the cluster see at the same path",
            )
        self._files, self._block = ExitStack(), ExitStack()
        self._files.enter_context(reproducible(self._device))
        self._offload_file = self._files.enter_context(
            offload_on(self._device, shared.scratch, [shared.linears[name] for name in shared.chosen])
        )
        self._states: StateFiles | None = None
        self._full: FullPrecisionStream | None = None
        self._groups: list[Group] = []
        self._forwards: dict[int, PausedForward] = {}
        self._parking = Parking(self._offload_file)
        self._held: dict[int, GroupInputs] = {}
        self._held_of: int | None = None
        self._at_head: Callable[[Tensor], Tensor] | None = None
        self._head: Tensor | None = None

    def close(self) -> None:
        """Frees memory and disk; the files of the hidden states stay."""
        self._leave()
        self._files.close()

    def start(self, units: int, tensors: Tensors | None) -> None:
        """Takes the windows to the block after some finished ones; what had been begun is given up.

        Args:
            units: how many blocks are finished.
            tensors: those outside the blocks, where they are sent.

        Raises:
            ResourceError: the activations of an earlier run are damaged.
        """
        self._leave()
        shared, size = self._shared, self._shared.batch_size
        windows = shared.input_ids[self._numbers.start * size : self._numbers.stop * size]
        with self._received.holding(tensors):
            embedded = self._runner.embedded([windows[:1, :8], *windows.split(size)])
            self._probe = next(embedded)
            self._stream, full = self._new_stream(0), self._new_stream(-(-len(shared.input_ids) // size))
            self._full = FullPrecisionStream(self._runner, full, self._offload_file) if shared.corrected else None
            for batch in embedded:
                for stream in self._streams:
                    own = Batch(batch.hidden.clone(), batch.calls)
                    stream.add_empty(own) if units else stream.add(own)
        for stream in self._streams if units else []:
            stream.read(units)

    @property
    def _streams(self) -> list[Stream]:
        return [self._stream, *([self._full.stream] if self._full else [])]

    def _new_stream(self, first: int) -> Stream:
        """One whose batches follow so many others in the files."""
        shared = self._shared
        if self._states is None:
            batch = shared.batch_size * shared.input_ids.shape[1] * self._probe.hidden[0, 0].nbytes
            everywhere = batch * len(self._numbers) * (2 if shared.corrected else 1)
            self._states = self._files.enter_context(
                StateFiles(
                    shared.kept or shared.scratch,
                    batch,
                    kept=shared.kept is not None,
                    on_device=self._offload_file.reserve(everywhere),
                )
            )
        return Stream(self._states, first + self._numbers.start)

    def begin(self, index: int, tensors: Tensors | None) -> list[GroupNames]:
        """Loads a block, and takes the windows through it before its layers are quantized, where that is asked for.

        Args:
            index: of the block.
            tensors: the block's, where they are sent.

        Returns:
            The groups of layers in the order in which the forward calls them.

        Raises:
            CompatibilityError: the block's forward does not call one of its layers.
        """
        name = self._runner.structure.blocks[index]
        chosen = [each for each in self._runner.structure.linears[name] if each.name in self._shared.chosen]
        self._block.enter_context(self._received.holding(tensors))
        block = self._block.enter_context(self._runner.block(index))
        of_experts = self._block.enter_context(self._stops(chosen))
        self._groups = self._found_groups(index, block, chosen, of_experts)
        if self._full is not None:
            self._full.run(index, block, self._groups)
        self._index = index
        self._forward = forward = partial(self._runner.forward, index, block)
        self._parking = parking = Parking(self._offload_file)
        for place, (number, batch) in enumerate(zip(self._numbers, self._stream.batches, strict=True)):
            parking.hold(*self._stream.restorer(place))
            paused = batch if self._shared.once else Batch(batch.hidden, batch.calls)
            self._forwards[number] = PausedForward(partial(forward, paused), parking)
        self._block.enter_context(pausing_at([group.stop for group in self._groups]))
        return [GroupNames(group.members, group.experts is not None) for group in self._groups]

    def begin_head(self, tensors: Tensors | None) -> list[GroupNames]:
        """The same for the output head, whose only group is itself."""
        head = self._runner.structure.head
        self._block.enter_context(self._received.holding(tensors))
        self._at_head = self._block.enter_context(self._runner.head_inputs())
        self._head = self._runner.read(f"{head}.weight")
        return [GroupNames(((head,),), experts=False)]

    def add(self, group: int, numbers: range, sums: list[GroupSums], weights: Tensor | None) -> list[GroupSums]:
        """Adds batches to sums over the inputs of a group. Their forwards go on to it first.

        Args:
            group: its number in what `begin` has returned.
            numbers: of batches, of which the shard's own are added.
            sums: changed.
            weights: how much each token of all windows counts, float32 [windows, tokens]; None for all alike.

        Returns:
            The same sums.
        """
        size = self._shared.batch_size
        if self._held_of != group:
            self._held, self._held_of = {}, group
        weights = None if weights is None else weights.to(self._device)
        for number in numbers:
            if number in self._numbers:
                counts = None if weights is None else weights[number * size : (number + 1) * size].flatten()
                batch = self._arrived(group, number, counts)
                for each in sums:
                    each.add(batch)
                self._park(number, batch)
        return sums

    def take(self, sums: list[GroupSums], names: Sequence[str]) -> dict[str, Tensor]:
        """What layers are to make up for.

        Args:
            sums: of the asymmetry of their input, or a part of it.
            names: the layers.

        Returns:
            See `Asymmetry.take`.
        """
        (asymmetry,) = [each.asymmetry for each in sums if each.asymmetry is not None]
        return asymmetry.take(self.weights(names), self._shared.alpha)

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Loaded layers' weights, contiguous float32 [out, in]: a view where they are that already."""
        return {name: self._matrix(name).to(torch.float32).contiguous() for name in names}

    def replace(self, weights: Tensors) -> None:
        """Writes weights [out, in] into their layers, by name."""
        self._held = {}
        for name, weight in weights.items():
            self._matrix(name).copy_(weight)

    def parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The loaded block's tensors, as views."""
        return {name: self._runner.parameter(name) for name in names}

    def end(self, late: Tensors) -> None:
        """Takes the windows through the rest of the block, and releases it.

        Args:
            late: weights [out, in] for its layers, with which the windows go through all of it once more.
        """
        for place, forward in enumerate(self._forwards.values()):
            forward.finish()
            if late:
                self._parking.park()
            else:
                self._stream.offload(self._index + 1, place)
        if late:
            self.replace(late)
            for place, batch in enumerate(self._stream.batches):
                self._stream.restore(place)
                with FixedProducts():
                    self._forward(batch)
                self._stream.offload(self._index + 1, place)
        self._leave()

    def kept(self, units: int) -> Path:
        """The file with the states after so many blocks, with which a later run, or another worker, goes on."""
        assert self._states is not None
        path = self._states.path(units)
        if not self._shared.alone:
            sync(path)  # on another machine, only its own call makes it durable
        return path

    def _leave(self) -> None:
        """Releases the block, or what is left of it."""
        self._forwards, self._held, self._held_of = {}, {}, None
        self._at_head, self._head = None, None
        self._block.close()
        self._offload_file.empty()

    def _head_input(self, stream: Stream, place: int) -> Tensor:
        assert self._at_head is not None
        with stream.restored(place) as hidden:
            return self._at_head(hidden)

    def _arrived(self, group: int, number: int, weights: Tensor | None) -> GroupInputs:
        """What a group receives from a batch."""
        if number in self._held:
            return self._held[number]
        place = number - self._numbers.start
        if self._at_head is not None:
            inputs = [self._head_input(stream, place) for stream in self._streams]
            return GroupInputs(inputs[:1], inputs[1] if self._full else None, weights)
        own = self._groups[group]
        inputs = own.inputs(self._forwards[number].advance())
        return GroupInputs(inputs, None if self._full is None else self._full.inputs(own, place), weights)

    def _park(self, number: int, batch: GroupInputs) -> None:
        """Frees the memory of all that a stopped forward holds: it would take most of it. What is needed several times
        stays until the group is solved.
        """
        if not self._shared.alone:
            self._held[number] = batch
        if self._at_head is None:
            self._parking.park([each.inputs for each in self._held.values()])

    @contextmanager
    def _stops(self, chosen: Sequence[LinearSpec]) -> Iterator[list[Group]]:
        """Makes the block's experts stop before their matrix products, and yields the groups of the chosen ones."""
        experts = [linear for linear in chosen if linear.expert]
        with ExitStack() as stack:
            groups = []
            for module in dict.fromkeys(self._runner.module(linear) for linear in experts):
                of_module = [linear for linear in experts if self._runner.module(linear) is module]
                for stop in stack.enter_context(staged(module, self._shared.expert_hessians)):
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

    def _found_groups(
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

    def _matrix(self, name: str) -> Tensor:
        """A loaded layer's weight [out, in], as a view of the parameter in memory."""
        if self._head is not None:
            return self._head
        weight = self._runner.parameter(f"{name}.weight")
        return weight.t() if self._shared.linears[name].transposed else weight


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
