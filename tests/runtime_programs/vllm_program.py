"""In place of vLLM: numbers that the test computes too, and what a program can do wrong, by the folder's name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 7


class Model:
    """What `answering` asks for."""

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        print("noise on the standard output", flush=True)
        os.write(1, b"\xff noise below Python\n")
        self._fault = Path(folder).name
        self._told = {"dtype": dtype, "arguments": {"longest": longest}}
        if self._fault == "refuses":
            raise ValueError("this folder is not for me")
        if self._fault == "dies":
            print("about to die", file=sys.stderr, flush=True)
            os._exit(3)
        if self._fault == "hangs":
            time.sleep(600)
        if self._fault == "grows":
            self._held = np.ones(400_000_000 // 8)
            time.sleep(600)

    def facts(self) -> dict[str, Any]:
        return {"version": "1.2", "kernels": {"Kernel": 3}, **self._told} if self._fault != "nameless" else {}

    def score(self, ids: list[int]) -> Any:
        if self._fault.startswith("crashes"):
            print("AMX model buffer size = 1 MiB" if self._fault.endswith("AMX") else "no hint", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        rows = len(ids) - (2 if self._fault == "short" else 1)
        return scores(ids)[:rows]

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        if self._fault == "short":
            return [[1.5] * new for _ in prompts]  # type: ignore[list-item]
        return [[(ids[-1] + step) % VOCABULARY for step in range(new)] for ids in prompts]

    def tokenized(self, texts: list[str]) -> list[list[int]] | None:
        if self._fault == "short":
            return [[]]
        return None if self._fault == "takes tokens alone" else [list(text.encode()) for text in texts]


def scores(ids: list[int]) -> Any:
    """float32 [tokens - 1, VOCABULARY]."""
    return np.array([[token * 10 + column for column in range(VOCABULARY)] for token in ids[:-1]], dtype=np.float32)
