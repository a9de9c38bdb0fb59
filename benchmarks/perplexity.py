"""Loss of a model's weights on the held-out windows and KL divergence from the merged model, by transformers alone.

Usage: perplexity.py WORK dense|packed MODEL. Prints JSON: of each window, both in nats a token.

Packed codes are unpacked here by plain shifts, not by qexport, and only for the benchmark's 4 bits. All is computed in
float32, but that matrix products have bfloat16 factors (their sums are float32), for the merged model alike. Its hidden
states stay in WORK for the next call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, Tensor]

ROWS = 64
"""Tokens whose logits are in memory at a time."""


def main() -> None:
    """Loads, dequantizes where needed, measures."""
    work, kind, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    windows = torch.tensor(json.loads((work / "tokens.json").read_text())["held_out"])
    kept = work / "merged.pt"
    if not kept.exists():
        torch.save(_before_logits(work, "dense", work / "merged", windows), kept)
    print(json.dumps(_figures(windows, torch.load(kept), _before_logits(work, kind, folder, windows))))


@torch.no_grad()
def _before_logits(work: Path, kind: str, folder: Path, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The head [vocabulary, hidden], and the hidden states that it multiplies [windows, tokens, hidden], in float32."""
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
    hidden = [model.model(part).last_hidden_state for part in windows.split(2)]
    return model.get_output_embeddings().weight, torch.cat(hidden)


@torch.no_grad()
def _figures(windows: Tensor, merged: tuple[Tensor, Tensor], measured: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    sums = torch.zeros(2, len(windows), dtype=torch.float64)
    for index, window in enumerate(windows):
        for places in torch.arange(len(window) - 1).split(ROWS):
            expected, actual = (
                (hidden[index, places] @ head.t()).log_softmax(-1) for head, hidden in (merged, measured)
            )
            sums[0, index] -= actual.gather(1, window[places + 1, None]).sum(dtype=torch.float64)
            sums[1, index] += (expected.exp() * (expected - actual)).sum(dtype=torch.float64)
    loss, kl = (sums / (windows.shape[1] - 1)).tolist()
    return {"loss": loss, "kl": kl}


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


if __name__ == "__main__":
    main()
