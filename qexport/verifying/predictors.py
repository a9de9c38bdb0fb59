"""Predictions of a model in some windows, in pieces that are made one after the other; several models side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner
from qexport.verifying.config_comparison import config_differences

Head = Callable[[Tensor], Tensor]
"""From hidden states [..., tokens, hidden_size] to float32 logits [..., tokens, vocabulary]."""

TOKENS_AT_ONCE: Final = 128


class Predictor(Protocol):
    """Gives the logits of the tokens that a model predicts: in each window all but the first, from those before it."""

    @property
    def windows(self) -> int:
        """For how many windows, from the first one on."""
        ...

    def logits(self, windows: range) -> Iterator[Tensor]:
        """float32 [tokens, vocabulary], window after window, `TOKENS_AT_ONCE` tokens at a time across their ends; the
        last piece may be shorter.

        Args:
            windows: one batch of those that `windows_at_once` makes.
        """
        ...


class HiddenStates:
    """Predictions of a model that was run block by block.

    Args:
        batches: the hidden states behind its last block, as `run_in_lockstep` returns them.
        head: the model's.
    """

    def __init__(self, batches: Sequence[Batch], head: Head) -> None:
        self._batches, self._head = batches, head

    @property
    def windows(self) -> int:
        """Those that were run."""
        return sum(len(batch.hidden) for batch in self._batches)

    def logits(self, windows: range) -> Iterator[Tensor]:
        """See `Predictor`."""
        hidden = self._batches[windows.start // len(self._batches[0].hidden)].hidden
        for states in hidden[:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE):
            yield self._head(states)[0]


@contextmanager
def predictors(runners: Sequence[BlockRunner], batches: Sequence[Sequence[Batch]]) -> Iterator[list[Predictor]]:
    """The predictions of models that were run block by block, as long as the context lasts.

    Args:
        runners: the models. A head that equals the first one's bit for bit is in memory only once.
        batches: each model's hidden states; some models may have only the first windows.
    """
    with ExitStack() as stack:
        heads = [stack.enter_context(runners[0].head())]
        for runner in runners[1:]:
            heads.append(heads[0] if _same_head(runners[0], runner) else stack.enter_context(runner.head()))
        yield [HiddenStates(own, head) for own, head in zip(batches, heads, strict=True)]


def _same_head(one: BlockRunner, other: BlockRunner) -> bool:
    """Weights are not all of it: a config.json may say another epsilon of the norm, or scale the logits."""
    if one.dtype != other.dtype or config_differences(one.architecture, other.architecture.config):
        return False
    return all(torch.equal(one.read(name), other.read(name)) for name in _head_parameters(one))


def _head_parameters(runner: BlockRunner) -> list[str]:
    """What stands outside the blocks and behind them (a model may have other embeddings, which do no harm here)."""
    structure = runner.structure
    before = () if structure.tied else (f"{structure.embedding}.",)
    skipped = (*before, *(f"{block}." for block in structure.blocks))
    return [name for name in structure.parameters if not name.startswith(skipped)]


BATCH_TOKENS: Final = 4096
"""Tokens that go through a block at a time."""


def windows_at_once(sequence_length: int) -> int:
    """How many windows make a batch."""
    return max(1, BATCH_TOKENS // sequence_length)


def run_in_lockstep(
    runners: Sequence[BlockRunner],
    input_ids: Tensor,
    finished: Callable[[int], None],
    *,
    windows: Sequence[int] | None = None,
    drift: bool = True,
) -> tuple[list[list[Batch]], list[float]]:
    """The hidden states behind the last block, for each model.

    Each block is run by one model, given back, and then run by the next.

    Args:
        runners: the models, with the same number of blocks.
        input_ids: int64 [windows, sequence_length].
        finished: is told the number of blocks that all models have run.
        windows: how many of the first windows each model runs; all where None. The first model runs all.
        drift: whether the second model runs all too, and is followed.

    Returns:
        One list of batches a model, with the same windows in the same order; and, where `drift` is asked for, how far
        the second model's hidden states are from the first one's behind each block: the norm of the difference over
        the norm of the first one's.
    """
    at_once, counts = windows_at_once(input_ids.shape[1]), windows or [len(input_ids)] * len(runners)
    batches = [runner.embed(input_ids[:count], at_once) for runner, count in zip(runners, counts, strict=True)]
    errors = []
    for index in range(len(runners[0].structure.blocks)):
        for runner, own in zip(runners, batches, strict=True):
            with runner.block(index) as block:
                for batch in own:
                    runner.forward(index, block, batch)
        if drift:
            errors.append(_relative_error(batches[0], batches[1]))
        finished(index + 1)
    return batches, errors


def _relative_error(ours: Sequence[Batch], theirs: Sequence[Batch]) -> float:
    """In float64 a window at a time, summed in an order that no number of threads changes."""
    difference, norm = 0.0, 0.0
    for own, other in zip(ours, theirs, strict=True):
        for states, others in zip(own.hidden, other.hidden, strict=True):
            wide = states.to(torch.float64)
            difference += _sum_of_squares(wide - others.to(torch.float64))
            norm += _sum_of_squares(wide)
    return math.sqrt(difference / norm) if norm else 0.0


def _sum_of_squares(values: Tensor) -> float:
    return math.fsum(values.square().sum(-1).tolist())
