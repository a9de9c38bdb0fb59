"""Predictions of a model in some windows, computed piece by piece; several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor

from qexport.architectures.lazy_model import at_least_float32
from qexport.architectures.memory import budget
from qexport.architectures.runner import Batch, BlockRunner
from qexport.verifying.config_comparison import config_differences

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
        batches: the hidden states after its last block, as `qexport.verifying.lockstep` leaves them.
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
    if 4 * rows > width or same_head(one, other):
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
    shared = [same_head(runners[0], runner) for runner in runners[1:]]  # before a head is in memory
    with ExitStack() as stack:
        heads = [stack.enter_context(runners[0].head())]
        for runner, same in zip(runners[1:], shared, strict=True):
            heads.append(heads[0] if same else stack.enter_context(runner.head()))
        yield heads


def same_head(one: BlockRunner, other: BlockRunner) -> bool:
    """Whether two models' heads are equal: their weights, and what config.json says, which may give the norm another
    epsilon, or scale the logits.
    """
    if one.dtype != other.dtype or config_differences(one.architecture, other.architecture.config):
        return False
    return all(torch.equal(one.read(name), other.read(name)) for name in head_parameters(one))


def head_parameters(runner: BlockRunner) -> list[str]:
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
