"""The benchmark's job with auto-round. Usage: autoround.py WORK NAME

NAME is autoround for the peer's 200 iterations, autoround-N for N; with 0 nothing is trained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """4 bits, symmetric, group 64, the peer's defaults otherwise."""
    work, name = Path(sys.argv[1]), sys.argv[2]
    windows = torch.tensor(json.loads((work / "tokens.json").read_text())["calibration"])
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(8)]
    model = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    samples, length = windows.shape
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=64,
        sym=True,
        iters=int(name.partition("-")[2] or 200),
        dataset=data,
        nsamples=samples,
        seqlen=length,
    )
    rounder.quantize_and_save(str(work / name), format="auto_gptq")


if __name__ == "__main__":
    main()
