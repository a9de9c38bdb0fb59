"""A tiny model that has learned its text, so that its predictions are sharp and a fault in it shows."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import factories
from disk_cache import kept

BLOCKS = 3
WINDOW = 32
CONFIG = factories.llama_config(num_hidden_layers=BLOCKS)
FALCON = factories.falcon_config(num_hidden_layers=1)

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
    return _trained("a trained Llama", CONFIG)


@cache
def trained_falcon() -> PreTrainedModel:
    """A Falcon of one block, likewise."""
    return _trained("a trained Falcon", FALCON)


def _trained(name: str, config: PretrainedConfig) -> PreTrainedModel:
    model = factories.build(config)
    model.load_state_dict(load(kept(name, partial(_weights, config))), strict=False)  # a tied head is stored once
    return model


def _weights(config: PretrainedConfig) -> bytes:
    model = factories.build(config, dtype=torch.float32)
    text, generator = torch.tensor(ids(seed=1)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        starts = torch.randint(len(text) - WINDOW, (_BATCH,), generator=generator).tolist()
        batch = torch.stack([text[start : start + WINDOW] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    torch.nn.Module.to(model, torch.bfloat16)
    return save(dict(model.named_parameters()))


def write_held_out(path: Path, *, seed: int = 2, passages: int = 40) -> Path:
    """Passages in a random order, each with its domain."""
    lines = [
        json.dumps({"text": text, "domain": _DOMAINS[factories.TEXT.index(text)]}) for text in _drawn(seed, passages)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def held_out_ids(windows: int) -> torch.Tensor:
    """int64 [windows, WINDOW]."""
    return torch.tensor(ids(seed=2))[: windows * WINDOW].view(windows, WINDOW)


def write_calibration(path: Path, *, passages: int = 120) -> Path:
    """Passages in another order, numbered so that none of them is a held-out document."""
    lines = [json.dumps({"text": f"{index}. {text}"}) for index, text in enumerate(_drawn(3, passages))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _drawn(seed: int, passages: int) -> list[str]:
    picks = torch.randint(len(factories.TEXT), (passages,), generator=torch.Generator().manual_seed(seed))
    return [factories.TEXT[pick] for pick in picks.tolist()]


def ids(seed: int) -> list[int]:
    """The tokens of 200 passages in a random order, each with its end."""
    tok = tokenizer()
    return [token for text in _drawn(seed, 200) for token in [*tok.encode(text), tok.eos_token_id]]
