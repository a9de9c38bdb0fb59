"""In place of a runtime: the folder as `qexport.load` reads it, in its own process, with a fault if one is named."""

from __future__ import annotations

import os
from typing import Any

import torch

import qexport


class Model:
    """What `answering` asks for."""

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        fault = os.environ.get("QEXPORT_TEST_FAULT")
        self._dtype = "bfloat16" if fault == "bfloat16" else None
        self._model: Any = qexport.load(folder, device="cpu", dtype=getattr(torch, self._dtype or dtype))
        torch.set_grad_enabled(False)
        if fault == "norm x 1.1":
            self._model.get_parameter("model.norm.weight").mul_(1.1)

    def facts(self) -> dict[str, Any]:
        return {"version": "1.2", "kernels": {"Linear4bit": 21}, "dtype": self._dtype, "arguments": {"eager": "True"}}

    def score(self, ids: list[int]) -> Any:
        logits = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).contiguous().numpy()

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found: list[list[int]] = output[:, len(prompts[0]) :].tolist()
        return found
