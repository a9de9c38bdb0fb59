"""Faults in the copy of a GPTQ folder that a server is given in place of the folder that our reader reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = "model.layers.3"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any]], None]


def zero_layer(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.scales"].zero_()


def rolled_scales(tensors: Tensors, config: dict[str, Any]) -> None:
    name = f"{LAYER}.mlp.up_proj.scales"
    tensors[name] = tensors[name].roll(1, 0).contiguous()


def smaller_output(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.self_attn.o_proj.scales"].mul_(0.9)


def half_rotated_keys(tensors: Tensors, config: dict[str, Any]) -> None:
    """Interleaved pairs in place of halves, as older programs store keys."""
    size = config["hidden_size"] // config["num_attention_heads"]
    for name in ("qweight", "scales"):
        stored = tensors[f"{LAYER}.self_attn.k_proj.{name}"]
        heads = stored.view(len(stored), -1, 2, size // 2).transpose(2, 3)
        tensors[f"{LAYER}.self_attn.k_proj.{name}"] = heads.reshape(stored.shape).contiguous()


def other_rope(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rope_theta"] = 10000.0
    config.get("rope_parameters", {})["rope_theta"] = 10000.0


def zero_rows(tensors: Tensors, config: dict[str, Any]) -> None:
    """A layer of W8A8."""
    tensors[f"{LAYER}.mlp.down_proj.weight_scale"].zero_()


def other_zeros(tensors: Tensors, config: dict[str, Any]) -> None:
    """One less than the 7 that symmetric codes have; vLLM does not look at them."""
    tensors[f"{LAYER}.mlp.up_proj.qzeros"].fill_(0x66666666)


SEEN: dict[str, Change] = {
    "a layer zero": zero_layer,
    "scales of a layer rolled": rolled_scales,
    "o_proj x 0.9": smaller_output,
    "half-rotated keys": half_rotated_keys,
    "rope theta": other_rope,
}
"""What the log-probabilities of a server show."""


def copied(folder: Path, copy: Path, change: Change | None = None) -> Path:
    """A copy of the folder with a change of its tensors and its config."""
    shutil.copytree(folder, copy)
    if change is not None:
        tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        (copy / "config.json").write_text(json.dumps(config))
    return copy


def give_other_tokenizer(folder: Path) -> None:
    """The tokenizer makes lower case of every text first, as that of an uncased model does."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content), encoding="utf-8")
