"""torch's kernel for products of bfloat16 with 4-bit codes: what it can serve, its packed form, and a check of it.

The kernel multiplies with `(code - 8) * scale + offset`, with scale and offset in bfloat16; codes of 2 and 3 bits fit
too. The reference is torch 2.13 (`aten/src/ATen/native/cpu/int4mm_kernel.cpp`, `LinearAlgebra.cpp`; for CUDA
`native/cuda/int4mm.cu`). What is here for CUDA has not run on a GPU; the check below is asked on each device all the
same, so that a wrong product ends in an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from qexport.amounts import counted
from qexport.errors import CompatibilityError, listed
from qexport.tensors import GroupQuantized, Quantized

FEW_ROWS: Final = 16
"""Up to so many inputs at a time the kernel is used. It takes their number as a factor; the product with a dequantized
weight hardly does, and on CPUs with AMX is faster from 8 on, without the time for dequantizing."""

_GROUPS: Final = (256, 128, 64, 32)
_MIDDLE: Final = 8
_VECTORS: Final = ("AVX2", "AVX512")
_CUDA_TILES: Final = {8: 128, 4: 64, 2: 32}
"""How many tiles of inputs CUDA's kernel goes through at a time, and what the inputs must be a multiple of for it."""

_HALF_STEP: Final = 2.0**-8
"""The largest relative error of rounding to bfloat16."""


@dataclass(frozen=True)
class Int4Weight:
    """A weight in the kernel's form.

    Attributes:
        codes: packed, in a form that depends on the device and on the CPU's instructions.
        scales: bfloat16 [groups, out, 2]: scale and offset.
        group_size: inputs per group, of which the kernel's may be a part.
    """

    codes: Tensor
    scales: Tensor
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scales.nbytes

    def product(self, inputs: Tensor) -> Tensor:
        """bfloat16 [..., out] of bfloat16 [..., in].

        Raises:
            CompatibilityError: the inputs are not bfloat16.
        """
        if inputs.dtype != torch.bfloat16:
            raise _other_dtype(f"the layer's inputs are {_name(inputs.dtype)}")
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = _operators(self.codes.device).product(rows, self.codes, self.group_size, self.scales)
        return product.reshape(*inputs.shape[:-1], product.shape[-1])


def refuse_device(device: torch.device, dtype: torch.dtype) -> None:
    """Asks the device for the kernel, and multiplies a small matrix with it.

    Raises:
        CompatibilityError: there is no such kernel for the device or the dtype, or it computes something else.
    """
    why = device_obstacle(device)
    if dtype != torch.bfloat16:
        raise _other_dtype(f"the model computes in {_name(dtype)}")
    if why is not None:
        raise CompatibilityError(f"the kernel int4 cannot be used: {why}", where=str(device), mend=_MEND)
    for group_size in _GROUPS:
        check(device, group_size)


def refuse_layers(unserved: Mapping[str, str], quantized: int) -> None:
    """Refuses a model with layers that the kernel cannot serve, or without any that it can.

    Args:
        unserved: why, for each such layer, by path.
        quantized: how many layers have codes.

    Raises:
        CompatibilityError: with the layers of each reason.
    """
    if not unserved and not quantized:
        raise CompatibilityError("the kernel int4 has nothing to do: no layer has codes", mend=_MEND)
    reasons: dict[str, list[str]] = {}
    for module, why in unserved.items():
        reasons.setdefault(why, []).append(module)
    if reasons:
        raise CompatibilityError(
            f"the kernel int4 cannot serve {counted(len(unserved), 'layer')}",
            where="; ".join(f"{why}: {listed(sorted(modules))}" for why, modules in reasons.items()),
            mend=_MEND,
        )


def device_obstacle(device: torch.device) -> str | None:
    """Why there is no such kernel on a device; None if there is."""
    if device.type == "cpu":
        found = torch.backends.cpu.get_cpu_capability()
        missing = not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        return _told(missing, found in _VECTORS, f"torch has it for {' and '.join(_VECTORS)}, this CPU has {found}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        missing = not hasattr(torch.ops.aten, "_weight_int4pack_mm")
        return _told(missing, major >= 8, f"it needs compute capability 8.0, this GPU has {major}.{minor}")
    return f"torch has no such kernel for {device.type}"


def _told(missing: bool, suited: bool, why: str) -> str | None:
    if missing:
        return f"torch {torch.__version__} has no such kernel"
    return None if suited else why


def layer_obstacle(weight: Quantized, device: torch.device) -> str | None:
    """Why the kernel cannot multiply with a weight; None if it can."""
    if not isinstance(weight, GroupQuantized):
        return "its codes are not steps of a scale in groups of inputs"
    if weight.bits > 4:
        return f"its codes have {weight.bits} bits"
    if not weight.in_order:
        return "its groups follow activation order"
    if _group_size(weight.group_size) is None:
        return f"groups of {weight.group_size} inputs are no multiples of {_GROUPS[-1]}"
    outputs, inputs = weight.codes.shape
    multiple = 16 if device.type == "cpu" else 8
    if outputs % multiple:
        return f"{outputs} outputs are no multiple of {multiple}"
    if device.type == "cuda" and inputs % _CUDA_TILES[2]:
        return f"{inputs} inputs are no multiple of {_CUDA_TILES[2]}"
    return None


def int4_weight(weight: GroupQuantized) -> Int4Weight:
    """The weight in the kernel's form, on its own device. Call `layer_obstacle` and `check` first."""
    group_size = _group_size(weight.group_size)
    assert group_size is not None
    scales, shift = weight.scales.float(), _shift(weight)
    both = torch.stack([scales, (_MIDDLE - shift - weight.zeros.float()) * scales], -1).to(torch.bfloat16)
    both = both.repeat_interleave(weight.group_size // group_size, 0)
    return Int4Weight(_operators(weight.codes.device).pack(weight.codes + shift), both.contiguous(), group_size)


def largest_error(weight: GroupQuantized) -> Tensor:
    """float32 [out, in]: how far the kernel's value of each weight may be from the dequantized one.

    Scale, offset, the weight and the output are each rounded to bfloat16 at most once, so the bound is far below a
    step of the codes. The slight rest is for products of these errors.
    """
    spread = weight.group_size
    scales, zeros = (each.t().float().repeat_interleave(spread, 1) for each in (weight.scales, weight.zeros))
    codes, middle = weight.codes.float(), _MIDDLE - _shift(weight)
    scaled = (codes - middle).abs() + (middle - zeros).abs()
    return 1.02 * _HALF_STEP * scales * (scaled + 2 * (codes - zeros).abs())


@cache
def check(device: torch.device, group_size: int) -> None:
    """Multiplies a small matrix of all codes, and compares each weight that the kernel used with the dequantized one.

    Raises:
        CompatibilityError: the kernel computes something else, or fails.
    """
    weight, where = _sample(device, group_size), f"torch {torch.__version__}, {device}"
    try:
        used = int4_weight(weight).product(torch.eye(weight.codes.shape[1], dtype=torch.bfloat16, device=device)).t()
    except RuntimeError as error:
        raise CompatibilityError(f"torch's int4 kernel fails: {error}", where=where, mend=_MEND) from error
    if bool(((used.float() - weight.dequantize()).abs() > largest_error(weight)).any()):
        raise CompatibilityError("torch's int4 kernel computes something else", where=where, mend=_MEND)


_MEND: Final = "load without kernel='int4'"


def _other_dtype(what: str) -> CompatibilityError:
    return CompatibilityError(
        f"the kernel int4 multiplies bfloat16, and {what}",
        mend="load with dtype=torch.bfloat16, or without kernel='int4'",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sample(device: torch.device, group_size: int) -> GroupQuantized:
    """64 outputs and two groups of at least 64 inputs, with every code, and scales and zero points that differ."""
    outputs, inputs = 64, 2 * max(group_size, 64)
    rows, columns = torch.arange(outputs, device=device)[:, None], torch.arange(inputs, device=device)
    groups = torch.arange(inputs // group_size, device=device)[:, None]
    return GroupQuantized(
        codes=((rows * 7 + columns * 5) % 16).to(torch.uint8),
        scales=(0.01 + 0.001 * ((rows.t() * 3 + groups * 5) % 13)).half(),
        zeros=(1 + (rows.t() + groups * 3) % 15).to(torch.uint8),
        g_idx=(columns // group_size).to(torch.int32),
        bits=4,
        group_size=group_size,
        sym=False,
        desc_act=False,
    )


def _shift(weight: GroupQuantized) -> int:
    """What is added to codes of fewer bits, whose middle would be far from the kernel's: offsets would be large, and
    rounding them would cost more than rounding the weights.
    """
    return _MIDDLE - (1 << (weight.bits - 1))


def _group_size(stored: int) -> int | None:
    """The largest group of the kernel that divides a stored one."""
    return next((each for each in _GROUPS if stored % each == 0), None)


@dataclass(frozen=True)
class _Operators:
    """The kernel on one type of device: `pack` takes uint8 [out, in]."""

    pack: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor, int, Tensor], Tensor]


def _operators(device: torch.device) -> _Operators:
    return _BY_DEVICE[device.type]


def _pack_for_cpu(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def _pack_for_cuda(codes: Tensor) -> Tensor:
    """Two codes a byte, the first one in the high bits, in tiles of inputs."""
    tiles = next(tiles for tiles, inputs in _CUDA_TILES.items() if codes.shape[1] % inputs == 0)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return packed


_BY_DEVICE: Final[Mapping[str, _Operators]] = {
    "cpu": _Operators(_pack_for_cpu, lambda *given: torch.ops.aten._weight_int4pack_mm_for_cpu.default(*given)),
    "cuda": _Operators(_pack_for_cuda, lambda *given: torch.ops.aten._weight_int4pack_mm.default(*given)),
}
