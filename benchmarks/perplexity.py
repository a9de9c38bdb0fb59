"""Perplexity of a model's weights on the held-out windows, in float32, by transformers alone.

Usage: perplexity.py WORK dense|packed MODEL. Prints one number.

Packed codes are unpacked here by plain shifts, not by qexport, and only for the benchmark's 4 bits.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, Tensor]


def main() -> None:
    """Loads, dequantizes where needed, measures."""
    work, kind, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    tensors: Tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):  # auto-round writes a folder inside
        tensors |= load_file(path)
    weights = tensors if kind == "dense" else _unpacked(tensors)
    config = AutoConfig.from_pretrained(work / "merged")
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    held_out = torch.tensor(json.loads((work / "tokens.json").read_text())["held_out"])
    print(math.exp(_mean_loss(model, held_out)))


def _unpacked(tensors: Tensors) -> Tensors:
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_PARTS)}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            weights[f"{module}.weight"] = _dequantized(*(tensors[f"{module}{part}"] for part in _PARTS))
    return weights


_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def _dequantized(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4)
    codes = (qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, qweight.shape[1])
    zeros = ((qzeros[:, :, None] >> shifts & 15) + 1).reshape(qzeros.shape[0], -1)
    return ((codes - zeros[g_idx]) * scales.float()[g_idx]).t()


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, windows: Tensor) -> float:
    total = 0.0
    for part in windows.split(2):
        logits = model(part).logits[:, :-1].double().log_softmax(-1)
        total -= float(logits.gather(2, part[:, 1:, None]).sum())
    return total / (windows.shape[0] * (windows.shape[1] - 1))


if __name__ == "__main__":
    main()
