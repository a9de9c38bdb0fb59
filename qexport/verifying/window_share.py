"""Some windows on their way through the blocks of models that are compared, on one worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.sending import ReceivedWeights, SentModel, Tensors
from qexport.architectures.structure import LinearSpec
from qexport.verifying.divergence import TokenFigures, compare_batch
from qexport.verifying.kept import KeptStates
from qexport.verifying.layer_inputs import sampled
from qexport.verifying.predictors import Head, HiddenStates, Predictor


class WindowRunner(Protocol):
    """A model that computes the logits of windows, without access to its hidden states."""

    def predictor(self, input_ids: Tensor) -> AbstractContextManager[Predictor]:
        """Its predictions in windows [windows, sequence_length], valid within the context."""
        ...


Squares = tuple[float, float]
"""Of one window's hidden states after a block: the squared norms of the difference of two models, and of the first."""


class WindowShare:
    """Batches of windows, and the models that they go through.

    Args:
        models: by their names. Those that are sent get their tensors with each call.
    """

    def __init__(self, models: Mapping[str, BlockRunner | WindowRunner | SentModel]) -> None:
        self._received = ReceivedWeights()
        self._models = {
            name: model.runner(self._received) if isinstance(model, SentModel) else model
            for name, model in models.items()
        }
        self._streams: dict[str, Stream] = {}
        self._opened = ExitStack()
        self._heads: dict[str, Head] = {}
        self._predictors: dict[str, Predictor] = {}

    def begin(self, input_ids: Tensor, at_once: int) -> None:
        """Takes other windows.

        Args:
            input_ids: int64 [windows, sequence_length].
            at_once: windows in a batch.
        """
        self.leave()
        self._input_ids, self._at_once = input_ids, at_once

    def leave(self) -> None:
        """Frees what the windows hold."""
        self._opened.close()
        for held in (self._streams, self._heads, self._predictors):
            held.clear()

    def embed(self, model: str, windows: int, kept: KeptStates | None, reads: bool, tensors: Tensors | None) -> None:
        """Takes windows to the first block of a model.

        Args:
            model: its name.
            windows: how many of the first ones.
            kept: where its states are kept, if they are.
            reads: whether they are read instead of computed.
            tensors: those outside the blocks, where they are sent.
        """
        with self._received.holding(tensors):
            own = self._input_ids[:windows]
            self._streams[model] = Stream(self._runner(model), own, self._at_once, kept, reads=reads)

    def through(
        self, model: str, index: int, watched: Sequence[LinearSpec], tensors: Tensors | None
    ) -> dict[str, Tensor]:
        """Takes the windows through a block.

        Args:
            model: its name.
            index: of the block.
            watched: layers in it whose inputs are wanted.
            tensors: the block's, where they are sent.

        Returns:
            A sample of the inputs of the watched layers, see `qexport.verifying.layer_inputs`.
        """
        with self._received.holding(tensors), sampled(self._runner(model), watched) as found:
            self._streams[model].through(index)
        return found

    def squares(self, one: str, other: str) -> list[Squares]:
        """How far two models' states are apart after the last block that both have run, for each window."""
        return squares_of(self._streams[one].batches, self._streams[other].batches)

    def open(self, name: str, like: str | None, tensors: Tensors | None) -> None:
        """Makes a model's predictions ready.

        Args:
            name: the model's.
            like: a model that is ready, whose head is bit for bit equal; None to load its own.
            tensors: of its head, where they are sent.
        """
        model = self._models[name]
        if not isinstance(model, BlockRunner):
            self._predictors[name] = self._opened.enter_context(model.predictor(self._input_ids))
            return
        if like is None:
            with self._received.holding(tensors):
                self._heads[name] = self._opened.enter_context(model.head())
        self._predictors[name] = HiddenStates(self._streams[name].batches, self._heads[like or name])

    def compare(self, windows: range, pairs: Mapping[str, tuple[str, str]]) -> dict[str, TokenFigures]:
        """The figures of a batch.

        Args:
            windows: the batch's.
            pairs: by the name of each comparison, a reference and an artifact. Those that do not both have these
                windows are left out.
        """
        present = [name for name, model in self._predictors.items() if model.windows > windows.start]
        chosen = {name: pair for name, pair in pairs.items() if {*pair} <= {*present}}
        indices = [(present.index(one), present.index(other)) for one, other in chosen.values()]
        models = [self._predictors[name] for name in present]
        return dict(zip(chosen, compare_batch(models, indices, self._input_ids, windows), strict=True))

    def states(self) -> list[list[Batch]]:
        """Of each model, in this process only: the windows after the last block."""
        return [stream.batches for stream in self._streams.values()]

    def _runner(self, name: str) -> BlockRunner:
        model = self._models[name]
        assert isinstance(model, BlockRunner)
        return model


class Stream:
    """One model's windows on their way through its blocks; states that were kept are read instead.

    Args:
        runner: the model.
        input_ids: int64 [windows, sequence_length].
        at_once: windows in a batch.
        kept: where its states are kept, if they are.
        reads: whether they are read instead of computed.

    Attributes:
        batches: the windows. States that were not kept after a block are missing there.
    """

    def __init__(
        self, runner: BlockRunner, input_ids: Tensor, at_once: int, kept: KeptStates | None, *, reads: bool
    ) -> None:
        self._runner, self._kept, self._reads = runner, kept, reads
        if reads:
            runner.embed(input_ids[:1, :1], 1)  # the head needs to know what the blocks return
            self.batches = [Batch(torch.empty(0), ()) for _ in input_ids.split(at_once)]
        else:
            self.batches = runner.embed(input_ids, at_once)

    def through(self, index: int) -> None:
        """Takes all windows through a block."""
        if self._kept is not None and self._reads:
            self._read(self._kept, index)
            return
        with self._runner.block(index) as block:
            for batch in self.batches:
                self._runner.forward(index, block, batch)
        if self._kept is not None:
            self._kept.keep(index, [batch.hidden for batch in self.batches])

    def _read(self, kept: KeptStates, index: int) -> None:
        if index in kept.blocks:
            for batch, states in zip(self.batches, kept.read(index), strict=True):
                batch.hidden = states.to(self._runner.device)


def squares_of(ours: Sequence[Batch], theirs: Sequence[Batch]) -> list[Squares]:
    """In float64, window by window, each summed in an order that does not depend on the number of threads."""
    found = []
    for own, other in zip(ours, theirs, strict=True):
        for states, others in zip(own.hidden, other.hidden, strict=True):
            wide = states.to(torch.float64)
            found.append((_sum_of_squares(wide - others.to(torch.float64)), _sum_of_squares(wide)))
    return found


def _sum_of_squares(values: Tensor) -> float:
    return math.fsum(values.square().sum(-1).tolist())
