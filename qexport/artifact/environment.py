"""The software and the type of processor that an artifact's bytes depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class Environment(BaseModel):
    """Versions and processor type. Names no host."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    python: str
    torch: str
    transformers: str
    safetensors: str
    numpy: str

    architecture: str
    """The machine's instruction set, for example `x86_64`."""

    cpu_capability: str
    """The vector instructions that torch uses, for example `AVX2`, `AVX512` or `AVX512 avx512_bf16`."""

    device: str
    """`cpu`, or the name of the accelerator."""


def describe_environment(device: torch.device) -> Environment:
    """What a run on `device` on this machine depends on."""
    import torch

    return Environment(
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        safetensors=version("safetensors"),
        numpy=version("numpy"),
        architecture=platform.machine(),
        cpu_capability=_cpu_capability(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _cpu_capability() -> str:
    """The vector level, and the bfloat16 instructions, which choose other kernels on top of it."""
    import torch

    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return " ".join(
        [torch.backends.cpu.get_cpu_capability(), *(n for n in ("avx512_bf16", "amx_bf16") if found.get(n))]
    )
