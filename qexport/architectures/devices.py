"""Where to compute."""

from __future__ import annotations

import torch

from qexport.errors import RecipeError


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is one, else the CPU.

    Raises:
        RecipeError: CUDA is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise RecipeError("there is no CUDA device", where=f"device {name}", mend="take the device cpu, or auto")
    return device
