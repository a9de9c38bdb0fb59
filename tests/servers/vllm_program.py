"""qexport's program for vLLM, with products in plain torch where vLLM has no kernel for this CPU, or a wrong one.

All else (config, loading, joining, repacking, scales) is vLLM's own. The argument `replaced` says which kernels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PROGRAM = Path(__file__).parents[2] / "qexport" / "runtimes" / "programs" / "vllm_program.py"
spec = importlib.util.spec_from_file_location("qexport_vllm_program", PROGRAM)
assert spec is not None
assert spec.loader is not None
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

LARGEST_INT8_ERROR = 0.01


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The eight codes of each int32, the first in the lowest bits: [..., n] to [..., 8 * n]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def cpu_gemm_wna16(
    activations: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """What vLLM's operator of this name computes from its weights, which are stored in blocks of 16 outputs."""
    assert pack_factor == 8, isa_hint
    inputs, outputs = activations.shape[1], scales.shape[1]
    words = weight.view(outputs // 16, inputs, 2).permute(1, 0, 2).reshape(inputs, outputs // 8)
    points = torch.tensor(8) if zeros is None else unpacked(zeros).repeat_interleave(inputs // len(scales), 0)
    values = (unpacked(words) - points).float() * scales.float().repeat_interleave(inputs // len(scales), 0)
    result = activations.float() @ values
    out.copy_(result if bias is None else result + bias.float())


def replace_missing_kernel() -> bool:
    """vLLM builds its 4-bit operator for AVX-512 only. Elsewhere the one above takes its place."""
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
    globals()["library"] = library  # its operators last as long as it does
    return True


def replace_wrong_kernel() -> bool:
    """oneDNN's product of int8 matrices saturates on x86 CPUs without VNNI. There an exact one takes its place."""
    from vllm import _custom_ops as operators

    if int8_error(operators) < LARGEST_INT8_ERROR:
        return False

    def create(weight: torch.Tensor, scales: torch.Tensor, *_: Any) -> Any:
        inputs, outputs = weight.shape
        return SimpleNamespace(k=inputs, n=outputs, values=weight.double() * scales.view(1, -1).double())

    def multiply(handler: Any, codes: torch.Tensor, out: torch.Tensor, scales: torch.Tensor, *rest: Any) -> None:
        bias = rest[-1]
        result = codes.double() @ handler.values * scales.double()
        out.copy_(result if bias is None else result + bias.double())

    operators.create_onednn_scaled_mm, operators.onednn_scaled_mm = create, multiply
    return True


def int8_error(operators: Any) -> float:
    """How far vLLM's product of full-range int8 matrices is off, relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 256), generator=generator, dtype=torch.int8)
    codes = torch.randint(-127, 128, (4, 256), generator=generator, dtype=torch.int8)
    scales, out = torch.ones(64, 1), torch.empty(4, 64)  # the handler points to the scales, and does not keep them
    handler = operators.create_onednn_scaled_mm(weight.t(), scales, out.dtype, True, False, 32)
    operators.onednn_scaled_mm(handler, codes, out, torch.ones(4, 1), None, None, None)
    exact = codes.double() @ weight.t().double()
    return float((out.double() - exact).norm() / exact.norm())


class Model(program.Model):  # type: ignore[misc,name-defined]
    """See `PROGRAM`."""

    def __init__(self, folder: str, dtype: str, longest: int) -> None:
        program.prepare()
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        replaced = {"4-bit": replace_missing_kernel(), "int8": replace_wrong_kernel()}
        self._replaced = [name for name, was in replaced.items() if was]
        super().__init__(folder, dtype, longest)

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = super().facts()
        return found | {"arguments": {**found["arguments"], "replaced": ",".join(self._replaced)}}
