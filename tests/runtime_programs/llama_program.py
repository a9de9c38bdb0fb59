"""In place of a runtime: a tiny Llama in numpy, from a folder unquantized or in NF4, with a fault if one is named.

It imports neither torch nor transformers, which would take three seconds at each start, and has no code of qexport.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"U8": np.uint8, "F32": np.float32, "BF16": np.uint16}


class Model:
    """What `answering` asks for."""

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        fault = os.environ.get("QEXPORT_TEST_FAULT")
        self._dtype = "bfloat16" if fault == "bfloat16" else None
        self._rounded: Callable[[Any], Any] = bfloat16 if self._dtype else np.asarray
        self._config = json.loads((Path(folder) / "config.json").read_text())
        self._weights = {name: self._rounded(each) for name, each in read(Path(folder) / "model.safetensors").items()}
        if fault == "norm x 1.1":
            self._weights["model.norm.weight"] *= 1.1

    def facts(self) -> dict[str, Any]:
        return {"version": "1.2", "kernels": {"Linear4bit": 21}, "dtype": self._dtype, "arguments": {"eager": "True"}}

    def score(self, ids: list[int]) -> Any:
        logits = self._logits(ids)[:-1]
        logits -= logits.max(-1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)

    def continued(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(new):
                ids.append(int(self._logits(ids)[-1].argmax()))
            found.append(ids[len(prompt) :])
        return found

    def _logits(self, ids: list[int]) -> Any:
        hidden = self._weights["model.embed_tokens.weight"][ids]
        for block in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{block}"
            hidden = self._rounded(hidden + self._attention(f"{name}.self_attn", self._norm(f"{name}.input", hidden)))
            hidden = self._rounded(hidden + self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention", hidden)))
        return self._rounded(self._norm("model.norm", hidden) @ self._weights["lm_head.weight"].T)

    def _norm(self, name: str, hidden: Any) -> Any:
        weight = self._weights[name + ("_layernorm.weight" if "layers" in name else ".weight")]
        size = np.sqrt((hidden**2).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        return self._rounded(weight * hidden / size)

    def _mlp(self, name: str, hidden: Any) -> Any:
        gate, up = (hidden @ self._weights[f"{name}.{each}_proj.weight"].T for each in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self._weights[f"{name}.down_proj.weight"].T

    def _attention(self, name: str, hidden: Any) -> Any:
        length, width = len(hidden), self._config["head_dim"]
        q, k, v = (hidden @ self._weights[f"{name}.{each}_proj.weight"].T for each in "qkv")
        q, k, v = (each.reshape(length, -1, width).transpose(1, 0, 2) for each in (q, k, v))
        q, k = self._turned(q), self._turned(k)
        k, v = (each.repeat(len(q) // len(each), axis=0) for each in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(width)
        scores[:, np.triu(np.ones((length, length), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        return mixed.transpose(1, 0, 2).reshape(length, -1) @ self._weights[f"{name}.o_proj.weight"].T

    def _turned(self, heads: Any) -> Any:
        """The rotary embedding of [heads, tokens, width]."""
        half = heads.shape[-1] // 2
        theta = self._config["rope_parameters"]["rope_theta"]
        angles = np.arange(heads.shape[1])[:, None] * theta ** -(np.arange(half) / half)
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def read(path: Path) -> dict[str, Any]:
    """Every weight in float64; those of NF4 are table entries times the largest value of their block, in bfloat16."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        begin, end = (8 + size + each for each in entry["data_offsets"])
        values = np.frombuffer(content[begin:end], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        stored[name] = (values.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else values
    return {name: dequantized(name, stored) for name in stored if name.endswith((".weight", ".bias"))}


def dequantized(name: str, stored: dict[str, Any]) -> Any:
    state = stored.get(f"{name}.quant_state.bitsandbytes__nf4")
    if state is None:
        return stored[name].astype(np.float64)
    described, codes = json.loads(state.tobytes()), stored[name].reshape(-1)
    values = stored[f"{name}.quant_map"][np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)]
    scaled = values.reshape(-1, described["blocksize"]) * stored[f"{name}.absmax"][:, None]
    assert described["dtype"] == "bfloat16"
    return bfloat16(scaled.reshape(described["shape"]))


def bfloat16(values: Any) -> Any:
    """The nearest values with eight bits of mantissa, in float64."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
