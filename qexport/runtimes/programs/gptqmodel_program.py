"""gptqmodel: logits of a folder with GPTQ codes, loaded with its own loader."""

from __future__ import annotations

import collections
import os
from typing import Any


class Model:
    """See `answering`. The kernel is named: the one that gptqmodel chooses by itself on CPUs rounds activations.

    Args:
        folder: of the artifact.
        dtype: to compute in. The kernel refuses to be loaded in float32, and computes in it all the same.
        longest: is ignored.
    """

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared is the arithmetic of one device
        import gptqmodel
        import torch
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear

        self._torch, self._version, self._kernel = torch, gptqmodel.__version__, BaseQuantLinear
        first = torch.bfloat16 if dtype == "bfloat16" else torch.float16
        wrapper = gptqmodel.GPTQModel.load(folder, device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=first)
        torch.set_grad_enabled(False)
        self._model, self._dtype = wrapper.model.to(getattr(torch, dtype)).eval(), dtype

    def facts(self) -> dict[str, Any]:
        """The version, and the kernel of each kind of layer."""
        kinds = collections.Counter(
            type(module).__name__ for module in self._model.modules() if isinstance(module, self._kernel)
        )
        return {
            "version": self._version,
            "kernels": dict(kinds),
            "dtype": self._dtype,
            "arguments": {"backend": "GPTQ_TORCH", "device": "cpu"},
        }

    def score(self, ids: list[int]) -> Any:
        """Log-probabilities of what follows each token but the last, float32 [tokens - 1, vocabulary]."""
        logits = self._model(input_ids=self._torch.tensor([ids]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).contiguous().numpy()

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The greedy continuation of each prompt."""
        return [self._continue(ids, new) for ids in prompts]

    def _continue(self, ids: list[int], new: int) -> list[int]:
        prompt = self._torch.tensor([ids])
        mask, plain = self._torch.ones_like(prompt), type(self._model.generation_config)()
        plain.update(max_new_tokens=new, do_sample=False, pad_token_id=0)  # no penalties, no end of text
        output = self._model.generate(input_ids=prompt, attention_mask=mask, generation_config=plain)
        tokens: list[int] = output[0, len(ids) :].tolist()
        return tokens
