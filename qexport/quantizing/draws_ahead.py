"""The generator's states from which workers draw tokens that begin within a text, computed while they are busy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from torch import Tensor

from qexport.architectures.structure import Structure
from qexport.quantizing.drawn_tokens import states_before


class DrawsAhead:
    """Goes through the draws of a text in a thread.

    Args:
        pieces: the tokens of each piece, as they are at the head at a time.
        wanted: the numbers of the pieces before whose draws the state is wanted.
        structure: of the model.
    """

    def __init__(self, pieces: Sequence[int], wanted: Collection[int], structure: Structure) -> None:
        owner = structure.embedding if structure.tied else structure.head
        self._pieces, self._wanted = pieces[: max(wanted) + 1], frozenset(wanted)
        self._vocabulary = structure.parameters[f"{owner}.weight"][0]
        self._closed, self._thread = Event(), ThreadPoolExecutor(1)
        self._states = self._thread.submit(self._computed)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.shutdown()

    def before(self, piece: int) -> Tensor:
        """The state before the draws of a wanted piece."""
        return self._states.result()[piece]

    def _computed(self) -> dict[int, Tensor]:
        found = {}
        for number, state in enumerate(states_before(self._pieces, self._vocabulary)):
            if number in self._wanted:
                found[number] = state
            if self._closed.is_set() or len(found) == len(self._wanted):
                break
        return found
