"""Runs in the environment of gptqmodel: loads a folder with its own loader and writes what the model computes.

    python load_with_gptqmodel.py FOLDER REQUEST RESPONSE

REQUEST holds `tokens` (rows of one length) and `backend` (a name of gptqmodel's BACKEND). RESPONSE is a safetensors
file with `logits` in float32, `[rows, length, vocabulary]`, and in its metadata `version`, `kernels` (the class of
every layer that gptqmodel holds as codes) and `foreign` (the parameters whose values are not those of the file: they
were initialised instead of read).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared is the arithmetic of one device

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file


def load(folder: Path, backend: str) -> torch.nn.Module:
    """The model, in float32 after loading: the kernels refuse to be loaded in it, and compute in it all the same."""
    wrapper = GPTQModel.load(str(folder), device="cpu", backend=BACKEND[backend], dtype=torch.float16)
    model: torch.nn.Module = wrapper.model
    return model.float().eval()


def foreign(model: torch.nn.Module, folder: Path) -> list[str]:
    """The parameters that the file does not have, or has with other values."""
    stored = load_file(folder / "model.safetensors")
    return [
        name
        for name, value in model.named_parameters()
        if name not in stored or not torch.equal(value, stored[name].float())
    ]


def main(folder: Path, request: Path, response: Path) -> None:
    """Answers one request."""
    asked: dict[str, Any] = json.loads(request.read_text())
    model = load(folder, asked["backend"])
    kernels = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)
    }
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(asked["tokens"])).logits
    answer = {
        "version": gptqmodel.__version__,
        "kernels": json.dumps(kernels),
        "foreign": json.dumps(foreign(model, folder)),
    }
    save_file({"logits": logits.float().contiguous()}, response, metadata=answer)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
