"""onnxruntime-genai: logits of every position of an ONNX folder."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]


class Model:
    """See `answering`.

    Args:
        folder: of the artifact.
        dtype: is ignored: a graph has its own.
        longest: the most tokens of a window, or of a prompt with its continuation.
    """

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        self._model, self._longest = og.Model(folder), longest
        self._config = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))

    def facts(self) -> dict[str, Any]:
        """The version, and where the graph computes."""
        decoder = self._config["model"]["decoder"]
        options = decoder.get("session_options", {})
        providers = [name for each in options.get("provider_options", []) for name in each] or ["CPU"]
        return {
            "version": og.__version__,
            "kernels": dict(collections.Counter(providers)),
            "dtype": str(self._generator(np.array([[0]], dtype=np.int32), 2).get_output("logits").dtype),
            "arguments": {"graph": str(decoder.get("filename")), "max_length": str(self._longest)},
        }

    def _generator(self, prompts: np.ndarray, length: int) -> Any:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=len(prompts), max_length=length, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(prompts)
        return generator

    def score(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of what follows each token but the last, float32 [tokens - 1, vocabulary]."""
        generator = self._generator(np.array([ids], dtype=np.int32), len(ids) + 1)
        logits = generator.get_output("logits")[0, : len(ids) - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.ascontiguousarray(logits.astype(np.float32))

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The greedy continuation of each prompt, up to an end of text."""
        return [self._continue(ids, new) for ids in prompts]

    def _continue(self, ids: list[int], new: int) -> list[int]:
        generator = self._generator(np.array([ids], dtype=np.int32), len(ids) + new)
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens
