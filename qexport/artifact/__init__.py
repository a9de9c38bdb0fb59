"""An artifact's folder: manifest, report, digests, publishing.

What manifest and report share is here: the environment they were made in, and what makes figures comparable.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from qexport.records import Record

if TYPE_CHECKING:
    import torch


class Environment(BaseModel):
    """Versions and processor type, without a host name."""

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


@cache
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
    """The vector instructions, and those for bfloat16, with which torch chooses other kernels."""
    import torch

    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack it
    return " ".join(
        [torch.backends.cpu.get_cpu_capability(), *(n for n in ("avx512_bf16", "amx_bf16") if found.get(n))]
    )


class Identity(Record):
    """What must be the same for two reports' figures to be comparable."""

    base_sha256: str
    """One digest over the base model's files."""

    adapter_sha256: str | None
    text_sha256: str
    """The held-out text."""

    prompts_sha256: str | None
    tokenizer_sha256: str
    template_sha256: str | None
    """The chat template."""


class Protocol(Record):
    """The arithmetic of the figures."""

    perplexity: Literal["non-overlapping windows, every token but the first"] = (
        "non-overlapping windows, every token but the first"
    )
    """The convention: perplexities of other conventions are other figures."""

    dtype: str
    """What the blocks computed in; the output head computes in float32."""

    sequence_length: int
    """Tokens in a window."""

    stride: int
    """Tokens from one window's start to the next one's; equal to sequence_length."""

    windows: int
    tokens: int
    """Tokens that were predicted."""

    looks: list[int]
    """How many windows had been measured each time the gates were evaluated."""

    confidence: float
    """Of every interval."""
