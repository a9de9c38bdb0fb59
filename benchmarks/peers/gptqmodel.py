"""The benchmark's job with gptqmodel. Usage: gptqmodel.py WORK NAME"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
sys.path.pop(0)  # this file has the peer's name

from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    """4 bits, symmetric, group 64, the peer's defaults otherwise."""
    work, name = Path(sys.argv[1]), sys.argv[2]
    windows = json.loads((work / "tokens.json").read_text())["calibration"]
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    model = GPTQModel.load(str(work / "merged"), QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False))
    model.quantize(examples, batch_size=8)
    model.save(str(work / name))


if __name__ == "__main__":
    main()
