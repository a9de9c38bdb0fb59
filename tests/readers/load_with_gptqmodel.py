"""Runs in the environment of gptqmodel: loads folders with its own loader and writes what the models compute.

    python load_with_gptqmodel.py REQUEST

REQUEST holds `tokens` (rows of one length) and `folders`. Into each folder's parent goes `answer.safetensors`: `logits`
in float32, `[rows, length, vocabulary]`, and in its metadata `version`, `kernels` (the class of every layer that
gptqmodel holds as codes) and `foreign` (the parameters whose values are not those of the file: they were initialised
instead of read).
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


def load(folder: Path) -> torch.nn.Module:
    """The model, in float32 after loading: the kernel refuses to be loaded in it, and computes in it all the same.

    The kernel is named, because the one that gptqmodel chooses by itself on CPUs rounds weights and activations.
    """
    wrapper = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    model: torch.nn.Module = wrapper.model
    return model.float().eval()


def foreign(model: torch.nn.Module, folder: Path) -> list[str]:
    """The parameters that the file does not have, or has with other values."""
    stored = load_file(folder / "model.safetensors")
    return [
        name
        for name, value in model.named_parameters()
        if name not in stored or not torch.equal(value, stored[name].half().float())
    ]


def answer(folder: Path, tokens: torch.Tensor) -> None:
    """Writes the answer for one folder."""
    model = load(folder)
    kernels = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)
    }
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert logits.dtype == torch.float32
    told = {
        "version": gptqmodel.__version__,
        "kernels": json.dumps(kernels),
        "foreign": json.dumps(foreign(model, folder)),
    }
    save_file({"logits": logits.contiguous()}, folder.parent / "answer.safetensors", metadata=told)


def main(request: Path) -> None:
    """Answers one request."""
    asked: dict[str, Any] = json.loads(request.read_text())
    for folder in asked["folders"]:
        answer(Path(folder), torch.tensor(asked["tokens"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
