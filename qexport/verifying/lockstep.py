"""Several models side by side, block by block: the windows are dealt out to workers, and their figures come back in the
windows' order, so that a report does not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.sending import SentModel, Tensors
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution, Hosted, Later, WorkerLostError
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.kept import KeptStates
from qexport.verifying.layer_inputs import LayerInputs
from qexport.verifying.predictors import head_parameters, same_head, windows_at_once
from qexport.verifying.window_share import Squares, WindowRunner, WindowShare

KeptOf = Callable[[str, Tensor], KeptStates | None]
"""Where the states of a model, by its name, are kept in some windows, if they are."""


@dataclass(frozen=True, eq=False)
class _Dealt:
    """What a worker has of the windows.

    Attributes:
        share: on the worker.
        batches: the windows of each of its batches, in their order.
    """

    share: Hosted[WindowShare]
    batches: list[range]

    def of_first(self, windows: int) -> int:
        """How many of the first windows of all are its own."""
        return sum(max(0, min(batch.stop, windows) - batch.start) for batch in self.batches)

    def rows(self, input_ids: Tensor) -> Tensor:
        """Its windows."""
        return input_ids[[window for batch in self.batches for window in batch]]

    def place(self, batch: range) -> range:
        """A batch among its own windows."""
        first = self.of_first(batch.start)
        return range(first, first + len(batch))


class Lockstep:
    """Models that are compared.

    Args:
        execution: the workers. A model that cannot be run block by block keeps all models in this process.
        models: by their names.
    """

    def __init__(self, execution: Execution, models: Mapping[str, BlockRunner | WindowRunner]) -> None:
        self._runners = {name: model for name, model in models.items() if isinstance(model, BlockRunner)}
        self._whole = [name for name in models if name not in self._runners]
        self._execution = INLINE if self._whole else execution
        hosted = {name: SentModel.of(self._runners[name]) for name in models} if self._execution.apart else models
        self._all = self._execution.host(WindowShare, [(hosted,)] * self._execution.workers)
        self._dealt: list[_Dealt] = []
        self._counts: Mapping[str, int] = {}
        self._reads: set[str] = set()

    @property
    def by_blocks(self) -> Collection[str]:
        """The names of the models that run block by block."""
        return self._runners

    def close(self) -> None:
        """Frees what the windows hold."""
        with suppress(WorkerLostError):
            self._done([share.call(WindowShare.leave) for share in self._all])

    def renew(self) -> None:
        """Replaces the shares whose workers have gone. What was begun must begin anew."""
        self._execution.renew(self._all)

    def begin(self, input_ids: Tensor, counts: Mapping[str, int], kept: KeptOf = lambda name, windows: None) -> None:
        """Takes windows to the first block.

        Args:
            input_ids: int64 [windows, sequence_length].
            counts: how many of the first windows each model runs that takes part; the first one runs all.
            kept: where states are kept: if all of a model's are there they are read, and the model is not run.
        """
        at_once = windows_at_once(input_ids.shape[1])
        batches = [range(first, min(first + at_once, len(input_ids))) for first in range(0, len(input_ids), at_once)]
        self._counts, self._dealt, self._reads = counts, _dealt_out(batches, counts.values(), self._all), set()
        self._done([each.share.call(WindowShare.begin, each.rows(input_ids), at_once) for each in self._dealt])
        for name, windows in counts.items():
            own = {each: each.of_first(windows) for each in self._having(name)}
            places = [kept(name, each.rows(input_ids)[:count]) for each, count in own.items()]
            reads = all(place is not None and place.complete for place in places)
            self._reads |= {name} if reads else set()
            tensors = self._sent(name, self._runners[name].structure.outside)
            self._done(
                each.share.call(WindowShare.embed, name, count, place, reads, tensors)
                for (each, count), place in zip(own.items(), places, strict=True)
            )

    def run(self, finished: Callable[[int], None], *, drift: bool, inputs: LayerInputs | None = None) -> list[float]:
        """Takes the windows through all blocks. For each block, one model after the other loads it, runs it and frees
        it.

        Args:
            finished: is called with the number of blocks that all models have run.
            drift: whether to measure the drift of the second model, which then runs all windows too.
            inputs: gets what the first model's layers receive, before the second one's tensors are read.

        Returns:
            With `drift`, the relative error of the second model's hidden states after each block: the norm of their
            difference from the first model's over the norm of the first model's.
        """
        blocks, errors = range(len(self._runners[next(iter(self._counts))].structure.blocks)), list[float]()
        running = deque[tuple[list[Later[dict[str, Tensor]]], list[Later[list[Squares]]]]]()
        for index in blocks:
            running.append((self._through(index, inputs), self._apart() if drift else []))
            while len(running) > (1 if self._execution.apart and index < blocks[-1] else 0):
                through, apart = running.popleft()  # workers go on with a block while the next is read
                self._done(through)
                if drift:
                    errors.append(_relative_error(self._in_order(each.result() for each in apart)))
                finished(index + 1 - len(running))
        return errors

    def _through(self, index: int, inputs: LayerInputs | None) -> list[Later[dict[str, Tensor]]]:
        """Begins to take the windows through a block of each model."""
        found = list[Later[dict[str, Tensor]]]()
        for number, name in enumerate(self._counts):
            structure = self._runners[name].structure
            watched = inputs.wanted(structure.blocks[index]) if inputs and not number else ()
            names = () if name in self._reads else structure.parameters_of(structure.blocks[index])
            tensors = self._sent(name, names)
            calls = [
                each.share.call(WindowShare.through, name, index, () if place else watched, tensors)
                for place, each in enumerate(self._having(name))
            ]
            if inputs and watched:
                inputs.receive(structure.blocks[index], calls[0].result())
            found += calls
        return found

    def _apart(self) -> list[Later[list[Squares]]]:
        one, other, *_ = self._counts
        return [each.share.call(WindowShare.squares, one, other) for each in self._dealt]

    def figures(self, pairs: Mapping[str, tuple[str, str]], finished: Callable[[int], None]) -> dict[str, TokenFigures]:
        """The figures of the models' predictions, after `run`.

        Args:
            pairs: by the name of each comparison, a reference and an artifact; on the windows that both have.
            finished: is called with the number of windows that were compared.

        Raises:
            NumericalError: a model's logits hold NaN or Inf.
        """
        self._open()
        parts: dict[str, list[TokenFigures]] = {name: [] for name in pairs}
        for batch, found in self._compared(pairs):
            for name, figures in found.items():
                parts[name].append(figures)
            finished(batch.stop)
        return {name: TokenFigures.joined(own) for name, own in parts.items()}

    def _open(self) -> None:
        """Makes the heads ready: each is sent to the workers that have windows of its model."""
        first, *others = self._counts
        same = [name for name in others if same_head(self._runners[first], self._runners[name])]  # before one is loaded
        for name in self._counts:
            like = first if name in same else None
            tensors = None if like else self._sent(name, head_parameters(self._runners[name]))
            self._done(each.share.call(WindowShare.open, name, like, tensors) for each in self._having(name))
        for name in self._whole:
            self._done(each.share.call(WindowShare.open, name, None, None) for each in self._dealt)

    def _compared(self, pairs: Mapping[str, tuple[str, str]]) -> Iterator[tuple[range, dict[str, TokenFigures]]]:
        """The figures of each batch, in the windows' order, of which each worker computes one ahead."""
        waiting = deque[tuple[range, Later[dict[str, TokenFigures]]]]()
        dealt = [(batch, each) for each in self._dealt for batch in each.batches]
        for batch, each in sorted(dealt, key=lambda pair: pair[0].start):
            if len(waiting) == len(self._dealt):
                done, found = waiting.popleft()
                yield done, found.result()
            waiting.append((batch, each.share.call(WindowShare.compare, each.place(batch), pairs)))
        for done, found in waiting:
            yield done, found.result()

    def states(self) -> list[list[Batch]]:
        """The windows of each model after the last block, where all is in this process."""
        (only,) = self._dealt
        return only.share.call(WindowShare.states).result()

    def _having(self, name: str) -> list[_Dealt]:
        """The workers that have windows of a model."""
        return [each for each in self._dealt if each.of_first(self._counts[name])]

    def _sent(self, name: str, tensors: Sequence[str]) -> Tensors | None:
        """Tensors of a model as an argument, where they are sent."""
        if not self._execution.apart:
            return None
        return self._execution.once(self._runners[name].unread(tensors)).argument

    def _in_order(self, of_shares: Iterable[Sequence[Squares]]) -> list[Squares]:
        """Values of all windows, from those of each share."""
        windows = [[window for batch in each.batches for window in batch] for each in self._dealt]
        found = {
            window: value
            for own, values in zip(windows, of_shares, strict=True)
            for window, value in zip(own, values, strict=True)
        }
        return [found[window] for window in sorted(found)]

    def _done(self, calls: Iterable[Later[Any]]) -> None:
        """Waits for calls that run at the same time."""
        for call in list(calls):
            call.result()


def _dealt_out(batches: Sequence[range], counts: Iterable[int], shares: Sequence[Hosted[WindowShare]]) -> list[_Dealt]:
    """Each batch goes to the worker that has least to do; no worker has none."""
    dealt, loads = [_Dealt(share, []) for share in shares[: len(batches)]], [0] * len(batches)
    for batch in batches:
        least = min(range(len(dealt)), key=lambda number: loads[number])
        dealt[least].batches.append(batch)
        loads[least] += sum(batch.start < count for count in counts)
    return dealt


def _relative_error(squares: Sequence[Squares]) -> float:
    difference, norm = 0.0, 0.0
    for of_difference, of_first in squares:
        difference += of_difference
        norm += of_first
    return math.sqrt(difference / norm) if norm else 0.0


def run_in_lockstep(
    runners: Sequence[BlockRunner],
    input_ids: Tensor,
    finished: Callable[[int], None],
    *,
    windows: Sequence[int] | None = None,
    drift: bool = True,
    inputs: LayerInputs | None = None,
) -> tuple[list[list[Batch]], list[float]]:
    """The hidden states after the last block, for each model, and the drift of the second one; all in this process.

    Args:
        runners: the models, with the same number of blocks.
        input_ids: int64 [windows, sequence_length].
        finished: see `Lockstep.run`.
        windows: how many of the first windows each model runs; None for all. The first model runs all.
        drift: see `Lockstep.run`.
        inputs: likewise.

    Returns:
        One list of batches per model, with the same windows in the same order; and, with `drift`, what `Lockstep.run`
        returns.
    """
    models = {str(number): runner for number, runner in enumerate(runners)}
    lockstep = Lockstep(INLINE, models)
    lockstep.begin(input_ids, dict(zip(models, windows or [len(input_ids)] * len(runners), strict=True)))
    errors = lockstep.run(finished, drift=drift, inputs=inputs)
    return lockstep.states(), errors
