"""A tiny model that has learned its text, so that its predictions are sharp and a fault in it shows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import factories
from disk_cache import kept

BLOCKS = 3
WINDOW = 32
CONFIG = factories.llama_config(num_hidden_layers=BLOCKS)

_STEPS = 60
_BATCH = 8
_DOMAINS = ("prose", "prose", "code", "french", "numbers")
"""Of the passages in `factories.TEXT`."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return factories.tokenizer()


@cache
def trained() -> PreTrainedModel:
    """A Llama in bfloat16 after some steps of training on the passages. Do not change it."""
    model = factories.build(CONFIG)
    model.load_state_dict(load(kept("a trained Llama", _weights)))
    return model


def _weights() -> bytes:
    model = factories.build(CONFIG, dtype=torch.float32)
    ids, generator = torch.tensor(_ids(seed=1)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        starts = torch.randint(len(ids) - WINDOW, (_BATCH,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    torch.nn.Module.to(model, torch.bfloat16)
    return save(model.state_dict())


def write_held_out(path: Path, *, seed: int = 2, passages: int = 40) -> Path:
    """Passages in a random order, each with its domain."""
    lines = [
        json.dumps({"text": text, "domain": _DOMAINS[factories.TEXT.index(text)]}) for text in _drawn(seed, passages)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def held_out_ids(windows: int) -> torch.Tensor:
    """int64 [windows, WINDOW]."""
    return torch.tensor(_ids(seed=2))[: windows * WINDOW].view(windows, WINDOW)


def write_calibration(path: Path, *, passages: int = 120) -> Path:
    """Passages in another order, numbered so that none of them is a held-out document."""
    lines = [json.dumps({"text": f"{index}. {text}"}) for index, text in enumerate(_drawn(3, passages))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _drawn(seed: int, passages: int) -> list[str]:
    picks = torch.randint(len(factories.TEXT), (passages,), generator=torch.Generator().manual_seed(seed))
    return [factories.TEXT[pick] for pick in picks.tolist()]


def _ids(seed: int) -> list[int]:
    tok = tokenizer()
    return [token for text in _drawn(seed, 200) for token in [*tok.encode(text), tok.eos_token_id]]
