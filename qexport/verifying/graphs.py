"""An ONNX artifact as verification runs it: whole, in ONNX Runtime; and checks of what held-out windows do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qexport.artifact.figures import CheckResult
from qexport.errors import NumericalError
from qexport.reading.onnx.model import OnnxCausalLM
from qexport.reading.stored_model import StoredModel
from qexport.tensors.source import is_finite
from qexport.verifying.predictors import TOKENS_AT_ONCE, in_pieces
from qexport.verifying.prompt_batches import MOST_KL, STEPS, batch_prompts, check_padding, log_likelihoods, mean_kl


class GraphRunner:
    """Opens the graph for each use, so that its weights are in memory only during that use.

    Args:
        artifact: an ONNX artifact, complete.
        device: where to compute.
    """

    def __init__(self, artifact: StoredModel, device: torch.device) -> None:
        self._artifact, self._device = artifact, device

    @contextmanager
    def whole(self) -> Iterator[OnnxCausalLM]:
        """The model in ONNX Runtime. Its generation settings follow from its config alone, as those of the other models
        do.
        """
        model = self._artifact.model(device=self._device)
        assert isinstance(model, OnnxCausalLM)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        yield model

    @contextmanager
    def predictor(self, input_ids: Tensor) -> Iterator[WindowByWindow]:
        """The model's predictions, valid within the context.

        Args:
            input_ids: int64 [windows, sequence_length].
        """
        with self.whole() as model:
            yield WindowByWindow(model, input_ids, where=str(self._artifact.folder))


class WindowByWindow:
    """Predictions of a graph, run one window at a time, since it computes the logits of all its input tokens at once.

    Args:
        model: the graph.
        input_ids: int64 [windows, sequence_length].
        where: the artifact, for error messages.
    """

    def __init__(self, model: OnnxCausalLM, input_ids: Tensor, *, where: str) -> None:
        self._model, self._input_ids, self._where = model, input_ids, where

    @property
    def windows(self) -> int:
        """All of them."""
        return len(self._input_ids)

    def logits(self, windows: range) -> Iterator[Tensor]:
        """See `Predictor`.

        Raises:
            NumericalError: they hold NaN or Inf.
            InputError: ONNX Runtime cannot run the graph.
        """
        return in_pieces(rows for window in windows for rows in self._rows(window))

    def _rows(self, window: int) -> Iterator[Tensor]:
        """A window's logits in small copies, so that no caller keeps the logits of a whole window in memory."""
        ids = self._input_ids[window : window + 1]
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        if not is_finite(logits):
            raise NumericalError(
                "the graph's logits hold NaN or Inf",
                where=f"{self._where}, held-out window {window}",
                mend="export with `activations: float32`; if they already are, a weight or an operator is damaged",
            )
        for rows in logits.split(TOKENS_AT_ONCE):
            yield rows.float().clone()


_MOST_KL: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-4, torch.float16: MOST_KL}
"""Nats, by the graph's activations. In float32 rounding stays below 1e-6, and a graph that ignores the past of one
layer may differ by only 1e-3. In float16 such faults are harder to see, most of all with inputs rounded to 8 bits.
"""

_TOKENS: Final = 96
"""Tokens of the longer prompt."""

_SETTINGS: Final = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, max_new_tokens=STEPS, pad_token_id=0)


@torch.no_grad()
def check_graph(model: PreTrainedModel, input_ids: Tensor) -> list[CheckResult]:
    """Checks that left padding does not change the predictions, and that decoding with the cache predicts what one
    forward over all tokens predicts. Both are properties of the graph alone, so no reference is needed.

    Args:
        model: the graph.
        input_ids: int64 [windows, sequence_length], held-out text.
    """
    longer = input_ids[0, : min(_TOKENS, max(2, input_ids.shape[1] - STEPS))].tolist()
    shorter = input_ids[-1, : max(1, len(longer) // 3)].tolist()
    return [
        _check("padding", "left padding", _padding(model, shorter, longer), _MOST_KL[model.dtype]),
        _check("cached decoding", "decoding with the cache", _decoding(model, longer), _MOST_KL[model.dtype]),
    ]


def _check(name: str, what: str, kl: float, most: float) -> CheckResult:
    changes = f"{what} changes the predictions by {kl:.2g} nats"
    return CheckResult(gate="graph", name=name, passed=kl <= most, detail=changes)


def _padding(model: PreTrainedModel, shorter: list[int], longer: list[int]) -> float:
    batches = batch_prompts([shorter, longer], new_tokens=STEPS, padded=True, fill=0)
    return check_padding(model, batches, _SETTINGS).kl or 0.0


def _decoding(model: PreTrainedModel, prompt: list[int]) -> float:
    """`log_likelihoods` repeats the prompt's last token at each step; the forward without a cache does too."""
    ids = torch.tensor([prompt])
    cached = log_likelihoods(model, ids, torch.ones_like(ids), _SETTINGS)
    full = torch.cat([ids, ids[:, -1:].expand(1, STEPS - 1)], 1)
    logits = model(input_ids=full.to(model.device), use_cache=False, logits_to_keep=STEPS).logits[0]
    return mean_kl(logits.log_softmax(-1, dtype=torch.float64), cached)
