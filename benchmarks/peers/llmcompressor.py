"""The benchmark's job with llmcompressor. Usage: llmcompressor.py WORK NAME

It is left uncompressed, as a dense model with the rounded values: that costs it nothing and is read by everybody.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.pop(0)  # this file has the peer's name

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """4 bits, symmetric, group 64, the peer's defaults otherwise."""
    work, name = Path(sys.argv[1]), sys.argv[2]
    windows = json.loads((work / "tokens.json").read_text())["calibration"]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    }
    model = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.bfloat16)
    modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model, dataset=data, recipe=modifier, max_seq_length=len(windows[0]), num_calibration_samples=len(windows)
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".weight", ".bias"))}
    from safetensors.torch import save_file

    (work / name).mkdir()
    state.pop("lm_head.weight", None)
    save_file({name: t.contiguous() for name, t in state.items()}, work / name / "model.safetensors")


if __name__ == "__main__":
    main()
