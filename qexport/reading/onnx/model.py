"""An ONNX artifact as a transformers model, computed by ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qexport.errors import CompatibilityError, InputError
from qexport.reading.onnx.session import Session, Value, open_session
from qexport.reading.onnx.weights import OnnxWeights

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


_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")


class OnnxCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward runs a graph in ONNX Runtime. It has no torch parameters.

    Args:
        config: the model's, as transformers reads it.
        session: the graph.
        stored_bytes: size of the stored weights.

    Attributes:
        session: the graph.
        stored_bytes: size of the stored weights.

    Raises:
        InputError: the graph does not have the inputs and outputs of a model with a cache.
    """

    main_input_name = "input_ids"

    def __init__(self, config: PretrainedConfig, session: Session, *, stored_bytes: int) -> None:
        super().__init__(config)
        self.session = session
        self.stored_bytes = stored_bytes
        unknown = [name for name in session.inputs if name not in _INPUTS and not name.startswith(PAST)]
        missing = [name for name in ("input_ids", "attention_mask") if name not in session.inputs]
        logits = session.outputs.get("logits")
        if unknown or missing or logits is None or len(logits.shape) != 3 or logits.shape[-1] is None:
            raise InputError(
                "the graph is not a causal language model",
                where=f"inputs {', '.join(session.inputs)}; outputs {', '.join(session.outputs)}",
                mend="export the model again; this graph was not made by qexport",
            )
        self._logits, self._vocabulary = logits, logits.shape[-1]
        check_states(session)
        self.train(False)

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs."""
        return self.session.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits and the cache."""
        return self._logits.dtype

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the stored weights; how much memory ONNX Runtime takes is not known."""
        return self.stored_bytes

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The logits of each token, and the cache after them.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: [batch, past + sequence], 0 for padding on the left; None for all ones.
            position_ids: int64 [batch, sequence]; None to count from each row's first token.
            past_key_values: what an earlier forward returned, which is changed in place; None at the start.
            use_cache: whether to return the cache; None for the config's value. Without it only the logits are
                fetched from the graph.
            logits_to_keep: how many of the last positions get logits, or which positions; 0 for all.
            return_dict: False for a tuple.

        Raises:
            CompatibilityError: the cache is not one of an ONNX graph.
            InputError: ONNX Runtime cannot run the graph with these inputs.
        """
        if past_key_values is not None and not isinstance(past_key_values, OnnxCache):
            raise CompatibilityError(f"a {type(past_key_values).__name__} is not a cache of an ONNX graph")
        batch, sequence = input_ids.shape
        cache = OnnxCache.empty(self.session, batch) if past_key_values is None else past_key_values
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache.get_seq_length())
        logits = torch.empty((batch, sequence, self._vocabulary), dtype=self.dtype, device=self.device)
        with_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        present = cache.following(sequence) if with_cache else {}
        self.session.run(inputs | cache.states, {"logits": logits} | present)
        if with_cache:
            cache.follow(present, sequence)
        output = CausalLMOutputWithPast(
            logits=cast("torch.FloatTensor", _kept(logits, logits_to_keep)),
            past_key_values=cache if with_cache else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _inputs(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: int) -> dict[str, Tensor]:
        batch, sequence = ids.shape
        if mask is None:
            mask = torch.ones((batch, past + sequence), dtype=torch.int64)
        if positions is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -sequence:]
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(batch, sequence)}
        return {
            name: tensor.to(self.device, torch.int64).contiguous()
            for name, tensor in found.items()
            if name in self.session.inputs
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the first forward makes the cache."""
        return False


def open_model(weights: OnnxWeights, *, device: torch.device) -> OnnxCausalLM:
    """An ONNX artifact's model, ready for `generate`.

    Every file that the graph names was checked when the artifact was opened; none is outside the folder.

    Args:
        weights: the artifact, complete.
        device: `cpu`, or a CUDA device.

    Raises:
        InputError: ONNX Runtime cannot load the graph on that device, or it is not a causal language model.
    """
    session = open_session(weights.folder, device=device)
    config = copy.deepcopy(weights.architecture.parsed)
    return OnnxCausalLM(config, session, stored_bytes=weights.stored_bytes)


def _kept(logits: Tensor, keep: int | Tensor) -> Tensor:
    """The logits to keep, copied, so that the memory of the others is freed."""
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:].clone() if 0 < keep < logits.shape[1] else logits
