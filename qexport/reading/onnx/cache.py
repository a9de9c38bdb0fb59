"""The cache of an ONNX graph between steps, as a cache of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache

from qexport.errors import CompatibilityError, InputError
from qexport.reading.onnx.session import Session, Value

PAST: Final = "past_key_values."
PRESENT: Final = "present."

_GROWING: Final = (".key", ".value")
_TOKENS: Final = 2
"""The dimension of keys and values that counts tokens."""


class OnnxCache(Cache):
    """Keys, values and recurrent states of a batch. Changed in place by each forward.

    Attributes:
        states: by the name of the graph's input (`past_key_values.0.key`), with the batch as the first dimension.
    """

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        super().__init__(layers=[])
        self.states = dict(states)
        self._length = 0

    @staticmethod
    def empty(session: Session, batch: int) -> OnnxCache:
        """The cache before the first token: no keys and values, and states of zeros."""
        past = {name: value for name, value in session.inputs.items() if name.startswith(PAST)}
        shapes = {name: _with_batch(name, value, batch, tokens=0) for name, value in past.items()}
        return OnnxCache(
            {name: torch.zeros(shapes[name], dtype=value.dtype, device=session.device) for name, value in past.items()}
        )

    def following(self, tokens: int) -> dict[str, Tensor]:
        """Memory for the graph's outputs after some more tokens, by the name of the output."""
        return {
            PRESENT + name.removeprefix(PAST): torch.empty(
                _grown(name, state, tokens), dtype=state.dtype, device=state.device
            )
            for name, state in self.states.items()
        }

    def follow(self, present: Mapping[str, Tensor], tokens: int) -> None:
        """Makes the outputs that the graph has written into the memory of `following` the new states."""
        self.states = {PAST + name.removeprefix(PRESENT): state for name, state in present.items()}
        self._length += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding counted."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: torch cannot compile the graph."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: every state exists from the start."""
        return True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the rows of the batch, for beam search."""
        self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        self._change(lambda state: state[indices].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Not supported: the graph joins old and new keys itself."""
        raise CompatibilityError("the cache of an ONNX graph cannot be used with another model")

    def crop(self, *_: Any, **__: Any) -> None:
        """Not supported: recurrent states cannot go back to an earlier token."""
        raise CompatibilityError(
            "the cache of an ONNX graph cannot be shortened", mend="generate without assisted decoding"
        )

    def reset(self) -> None:
        """Not supported: make a new cache instead."""
        raise CompatibilityError(
            "the cache of an ONNX graph cannot be reset", mend="pass no cache at the start of a text"
        )

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: change(state) for name, state in self.states.items()}


def check_states(session: Session) -> None:
    """Checks that each state is an input and an output, with all sizes known but batch and tokens.

    Raises:
        InputError: a state is missing on one side, or its dtype or shape differs or is not known.
    """
    past = {name.removeprefix(PAST): value for name, value in session.inputs.items() if name.startswith(PAST)}
    present = {name.removeprefix(PRESENT): value for name, value in session.outputs.items() if name.startswith(PRESENT)}
    if different := sorted(name for name in past.keys() | present.keys() if not _agree(name, past, present)):
        raise InputError(
            "the graph has different cache inputs and outputs",
            where=", ".join(different),
            mend="export the model again; this graph was not made by qexport",
        )


def _agree(name: str, past: Mapping[str, Value], present: Mapping[str, Value]) -> bool:
    """Whether input and output agree. Outputs may leave sizes open that the inputs fix."""
    if name not in past or name not in present or past[name].dtype != present[name].dtype:
        return False
    free = (0, _TOKENS) if name.endswith(_GROWING) else (0,)
    before, after = past[name].shape, present[name].shape
    known = all(size is not None for place, size in enumerate(before) if place not in free)
    return known and len(before) > max(free) and len(before) == len(after)


def _with_batch(name: str, value: Value, batch: int, *, tokens: int) -> list[int]:
    shape = [0 if size is None else size for size in value.shape]
    shape[0] = batch
    if name.endswith(_GROWING):
        shape[_TOKENS] = tokens
    return shape


def _grown(name: str, state: Tensor, tokens: int) -> list[int]:
    shape = list(state.shape)
    if name.endswith(_GROWING):
        shape[_TOKENS] += tokens
    return shape
