"""An ONNX artifact as a model of transformers, computed by ONNX Runtime."""

from __future__ import annotations

import copy
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qexport.errors import CompatibilityError, InputError
from qexport.reading.onnx.cache import PAST, OnnxCache, check_states
from qexport.reading.onnx.session import Session, open_session
from qexport.reading.onnx.weights import OnnxWeights

_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")


class OnnxCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward is a graph in ONNX Runtime. It has no parameters of its own.

    Args:
        config: the model's, as transformers reads it.
        session: the graph.
        stored_bytes: of the weights, as they are stored.

    Attributes:
        session: the graph.
        stored_bytes: of the weights, as they are stored.

    Raises:
        InputError: the graph has not the inputs and outputs of a model with a cache.
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
                "the graph is no causal language model",
                where=f"inputs {', '.join(session.inputs)}; outputs {', '.join(session.outputs)}",
                mend="export the model again; this graph is of another maker",
            )
        self._logits, self._vocabulary = logits, logits.shape[-1]
        check_states(session)
        self.train(False)

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs lie."""
        return self.session.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits and the cache."""
        return self._logits.dtype

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights as they are stored; what ONNX Runtime makes of them is not known."""
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
        """The logits of each token, and the cache behind them.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: [batch, past + sequence], 0 for padding on the left; all ones where None.
            position_ids: int64 [batch, sequence]; counted from each row's first token where None.
            past_key_values: what an earlier forward returned, which is changed in place; None at the start.
            use_cache: whether the cache goes on; as the config says where None. Without it nothing but the logits is
                fetched from the graph.
            logits_to_keep: how many of the last places get logits, or which; all where 0.
            return_dict: False for a tuple.

        Raises:
            CompatibilityError: the cache is another model's.
            InputError: ONNX Runtime cannot run the graph with these inputs.
        """
        if past_key_values is not None and not isinstance(past_key_values, OnnxCache):
            raise CompatibilityError(f"a {type(past_key_values).__name__} is no cache of an ONNX graph")
        batch, sequence = input_ids.shape
        cache = OnnxCache.empty(self.session, batch) if past_key_values is None else past_key_values
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache.get_seq_length())
        logits = torch.empty((batch, sequence, self._vocabulary), dtype=self.dtype, device=self.device)
        keep_on = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        present = cache.following(sequence) if keep_on else {}
        self.session.run(inputs | cache.states, {"logits": logits} | present)
        if keep_on:
            cache.follow(present, sequence)
        output = CausalLMOutputWithPast(
            logits=cast("torch.FloatTensor", _kept(logits, logits_to_keep)),
            past_key_values=cache if keep_on else None,
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
        """No: the first forward makes the cache."""
        return False


def open_model(weights: OnnxWeights, *, device: torch.device) -> OnnxCausalLM:
    """An ONNX artifact's model, ready for `generate`.

    Everything that the graph names was looked at when the artifact was opened; nothing outside of the folder is read.

    Args:
        weights: the artifact, complete.
        device: `cpu`, or a CUDA device.

    Raises:
        InputError: ONNX Runtime cannot load the graph on that device, or it is no causal language model.
    """
    session = open_session(weights.folder, device=device)
    config = copy.deepcopy(weights.architecture.parsed)
    return OnnxCausalLM(config, session, stored_bytes=weights.stored_bytes)


def _kept(logits: Tensor, keep: int | Tensor) -> Tensor:
    """Some places in memory of their own, so that the others need not stay."""
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:].clone() if 0 < keep < logits.shape[1] else logits
