"""Where to compute."""

from __future__ import annotations

import re

import torch

from qexport.errors import RecipeError


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is one, else the CPU.

    Raises:
        RecipeError: it is no name of a CPU or CUDA device, or CUDA is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name, re.ASCII):
        raise RecipeError(f"{name!r} is no device", where="device", mend="take auto, cpu, cuda, or for example cuda:1")
    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise RecipeError("there is no CUDA device", where=f"device {name}", mend="take the device cpu, or auto")
    return device
