"""An ONNX artifact as verification runs it: whole, from its folder, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from qexport.errors import NumericalError
from qexport.reading.onnx.model import OnnxCausalLM, open_model
from qexport.tensors.finite import is_finite
from qexport.verifying.predictors import TOKENS_AT_ONCE


class GraphRunner:
    """Opens the graph each time that it is asked for, so that the weights are in memory only meanwhile.

    Args:
        folder: the artifact.
        device: where to compute.

    Attributes:
        folder: the artifact.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self._device = folder, device

    @contextmanager
    def whole(self) -> Iterator[OnnxCausalLM]:
        """The model in ONNX Runtime, with the settings of a generation that follow from its config alone, as the other
        models have them.

        Raises:
            RecipeError: ONNX Runtime is not installed.
            InputError: the folder is damaged, or ONNX Runtime cannot load it on this device.
        """
        model = open_model(self.folder, device=self._device)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        yield model

    @contextmanager
    def predictor(self, input_ids: Tensor) -> Iterator[WindowByWindow]:
        """The model's predictions as long as the context lasts.

        Args:
            input_ids: int64 [windows, sequence_length].
        """
        with self.whole() as model:
            yield WindowByWindow(model, input_ids, where=str(self.folder))


class WindowByWindow:
    """Predictions of a graph, which gives the logits of all tokens that it is asked for: a window is run at a time.

    Args:
        model: the graph.
        input_ids: int64 [windows, sequence_length].
        where: the artifact, for an error.
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
            NumericalError: there is NaN or Inf in them.
            InputError: ONNX Runtime cannot run the graph.
        """
        waiting = list[Tensor]()
        for rows in (rows for window in windows for rows in self._rows(window)):
            missing = TOKENS_AT_ONCE - sum(map(len, waiting))
            waiting.append(rows[:missing])
            if len(rows) >= missing:
                yield torch.cat(waiting)
                waiting = [rows[missing:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting)

    def _rows(self, window: int) -> Iterator[Tensor]:
        """A window's logits in small copies, so that nobody keeps the logits of a whole window."""
        ids = self._input_ids[window : window + 1]
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        if not is_finite(logits):
            raise NumericalError(
                "the graph's logits hold NaN or Inf",
                where=f"{self._where}, held-out window {window}",
                mend="export with `activations: float32`; if they are, a weight or an operator is damaged",
            )
        for rows in logits.split(TOKENS_AT_ONCE):
            yield rows.float().clone()
