"""Predictions of a model in some windows, computed piece by piece; several models side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor

from qexport.architectures.lazy_model import at_least_float32
from qexport.architectures.memory import budget
from qexport.architectures.runner import Batch, BlockRunner
from qexport.verifying.config_comparison import config_differences
from qexport.verifying.kept import KeptStates

Head = Callable[[Tensor], Tensor]
"""From hidden states [..., tokens, hidden_size] to float32 logits [..., tokens, vocabulary]."""

TOKENS_AT_ONCE: Final = 128


class Predictor(Protocol):
    """The logits of the tokens that a model predicts: in each window all but the first, from those before it."""

    @property
    def windows(self) -> int:
        """The number of windows that it has predictions for, from the first one on."""
        ...

    def logits(self, windows: range) -> Iterator[Tensor]:
        """float32 [tokens, vocabulary], window after window, in pieces of `TOKENS_AT_ONCE` tokens that may span
        windows; the last piece may be shorter.

        Args:
            windows: one batch, `windows_at_once` windows or fewer.
        """
        ...


def in_pieces(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits as `Predictor` yields them, from pieces of at most `TOKENS_AT_ONCE` tokens each."""
    waiting = list[Tensor]()
    for each in rows:
        missing = TOKENS_AT_ONCE - sum(map(len, waiting))
        waiting.append(each[:missing])
        if len(each) >= missing:
            yield torch.cat(waiting)
            waiting = [each[missing:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


class HiddenStates:
    """Predictions of a model that was run block by block.

    Args:
        batches: the hidden states after its last block, as `run_in_lockstep` returns them.
        head: the model's.
    """

    def __init__(self, batches: Sequence[Batch], head: Head) -> None:
        self._batches, self._head = batches, head

    @property
    def windows(self) -> int:
        """The windows that were run."""
        return sum(len(batch.hidden) for batch in self._batches)

    def logits(self, windows: range) -> Iterator[Tensor]:
        """See `Predictor`."""
        hidden = self._batches[windows.start // len(self._batches[0].hidden)].hidden
        for states in hidden[:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE):
            yield self._head(states)[0]


class KeptLogits:
    """Predictions of a model whose logits stay in memory, so that its head need not.

    Args:
        batches: the hidden states after its last block.
        head: the model's.
    """

    def __init__(self, batches: Sequence[Batch], head: Head) -> None:
        states, at_once = HiddenStates(batches, head), len(batches[0].hidden)
        self.windows = states.windows
        self._pieces = {
            first: list(states.logits(range(first, first + at_once))) for first in range(0, self.windows, at_once)
        }

    def logits(self, windows: range) -> Iterator[Tensor]:
        """See `Predictor`."""
        yield from self._pieces[windows.start]


@contextmanager
def two_predictors(
    runners: tuple[BlockRunner, BlockRunner], batches: tuple[Sequence[Batch], Sequence[Batch]]
) -> Iterator[list[Predictor]]:
    """The predictions of two models that were run block by block, valid within the context.

    Equal heads are in memory once. Of others the second is there beside the first, or beside the first model's logits,
    whichever takes less: a vocabulary of 262,144 makes 2.1 GB of 2,048 tokens' logits.

    Args:
        runners: the models.
        batches: each model's hidden states.
    """
    one, other = runners
    rows = sum(batch.hidden.shape[:-1].numel() for batch in batches[0])
    width = batches[0][0].hidden.shape[-1] * at_least_float32(one.dtype).itemsize
    if 4 * rows > width or _same_head(one, other):
        with predictors(runners, batches) as found:
            yield found
        return
    with one.head() as head:
        kept = KeptLogits(batches[0], head)
    with other.head() as head:
        yield [kept, HiddenStates(batches[1], head)]


@contextmanager
def predictors(runners: Sequence[BlockRunner], batches: Sequence[Sequence[Batch]]) -> Iterator[list[Predictor]]:
    """The predictions of models that were run block by block, valid within the context.

    Args:
        runners: the models. A head that is bit for bit equal to the first model's is in memory only once.
        batches: each model's hidden states; some models may have only the first windows.
    """
    with shared_heads(runners) as heads:
        yield [HiddenStates(own, head) for own, head in zip(batches, heads, strict=True)]


@contextmanager
def shared_heads(runners: Sequence[BlockRunner]) -> Iterator[list[Head]]:
    """Each model's head, valid within the context; one that is bit for bit equal to the first model's is in memory only
    once.
    """
    shared = [_same_head(runners[0], runner) for runner in runners[1:]]  # before a head is in memory
    with ExitStack() as stack:
        heads = [stack.enter_context(runners[0].head())]
        for runner, same in zip(runners[1:], shared, strict=True):
            heads.append(heads[0] if same else stack.enter_context(runner.head()))
        yield heads


def _same_head(one: BlockRunner, other: BlockRunner) -> bool:
    """Equal weights are not enough: a config.json may give the norm another epsilon, or scale the logits."""
    if one.dtype != other.dtype or config_differences(one.architecture, other.architecture.config):
        return False
    return all(torch.equal(one.read(name), other.read(name)) for name in _head_parameters(one))


def _head_parameters(runner: BlockRunner) -> list[str]:
    """The parameters outside the blocks, except the input embedding. Other embeddings do no harm here."""
    structure = runner.structure
    skipped = () if structure.tied else (f"{structure.embedding}.",)
    return [name for name in structure.outside if not name.startswith(skipped)]


BATCH_TOKENS: Final = 4096
"""Tokens that go through a block at a time, at most."""


def most_windows_at_once(sequence_length: int) -> int:
    """The number of windows in a batch where memory is no concern."""
    return max(1, BATCH_TOKENS // sequence_length)


def windows_at_once(sequence_length: int) -> int:
    """The number of windows in a batch: the largest divisor of `most_windows_at_once` that the budget allows."""
    most = most_windows_at_once(sequence_length)
    allowed = max(1, int(min(BATCH_TOKENS, budget().compared_tokens)) // sequence_length)
    return next(count for count in range(most, 0, -1) if most % count == 0 and count <= allowed)


def run_in_lockstep(
    runners: Sequence[BlockRunner],
    input_ids: Tensor,
    finished: Callable[[int], None],
    *,
    windows: Sequence[int] | None = None,
    drift: bool = True,
    kept: Sequence[KeptStates | None] | None = None,
) -> tuple[list[list[Batch]], list[float]]:
    """The hidden states after the last block, for each model.

    For each block, one model after the other loads it, runs it and frees it.

    Args:
        runners: the models, with the same number of blocks.
        input_ids: int64 [windows, sequence_length].
        finished: is called with the number of blocks that all models have run.
        windows: how many of the first windows each model runs; None for all. The first model runs all.
        drift: whether to measure the drift of the second model, which then runs all windows too.
        kept: for each model, where its states are kept, if they are: what is there is read, and the model not run.

    Returns:
        One list of batches per model, with the same windows in the same order; and, with `drift`, the relative error of
        the second model's hidden states after each block: the norm of their difference from the first model's over
        the norm of the first model's.
    """
    at_once, counts = windows_at_once(input_ids.shape[1]), windows or [len(input_ids)] * len(runners)
    streams = [
        _Stream(runner, input_ids[:count], at_once, states)
        for runner, count, states in zip(runners, counts, kept or [None] * len(runners), strict=True)
    ]
    errors = []
    for index in range(len(runners[0].structure.blocks)):
        for stream in streams:
            stream.through(index)
        if drift:
            errors.append(_relative_error(streams[0].batches, streams[1].batches))
        finished(index + 1)
    return [stream.batches for stream in streams], errors


class _Stream:
    """One model's windows on their way through its blocks; states that were kept are read instead.

    Args:
        runner: the model.
        input_ids: int64 [windows, sequence_length].
        at_once: windows in a batch.
        kept: where its states are kept, if they are.

    Attributes:
        batches: the windows. States that were not kept after a block are missing there.
    """

    def __init__(self, runner: BlockRunner, input_ids: Tensor, at_once: int, kept: KeptStates | None) -> None:
        self._runner, self._kept = runner, kept
        self._reads = kept is not None and kept.complete
        if self._reads:
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


def _relative_error(ours: Sequence[Batch], theirs: Sequence[Batch]) -> float:
    """In float64, one window at a time, summed in an order that does not depend on the number of threads."""
    difference, norm = 0.0, 0.0
    for own, other in zip(ours, theirs, strict=True):
        for states, others in zip(own.hidden, other.hidden, strict=True):
            wide = states.to(torch.float64)
            difference += _sum_of_squares(wide - others.to(torch.float64))
            norm += _sum_of_squares(wide)
    return math.sqrt(difference / norm) if norm else 0.0


def _sum_of_squares(values: Tensor) -> float:
    return math.fsum(values.square().sum(-1).tolist())
