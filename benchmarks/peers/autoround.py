"""The benchmark's job with auto-round in its mode without training (iters=0). Usage: autoround.py WORK"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """4 bits, symmetric, group 64, the peer's defaults otherwise."""
    work = Path(sys.argv[1])
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
        iters=0,
        dataset=data,
        nsamples=samples,
        seqlen=length,
    )
    rounder.quantize_and_save(str(work / "autoround"), format="auto_gptq")


if __name__ == "__main__":
    main()
