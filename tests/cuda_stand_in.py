"""A device that says it is CUDA and computes on the CPU: what is written for CUDA runs without a GPU, as far as torch
alone is concerned.

A tensor of it holds one of the CPU. As on CUDA, an operation refuses tensors of both devices, but for copies, indices
and single values. What is not imitated: kernels, the bits of their results, streams, and the memory of a storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)

_BETWEEN = {
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
}
"""Operations that take tensors of both devices."""


class StandIn(Tensor):
    """A tensor of the device."""

    inner: Tensor  # type: ignore[assignment]
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> StandIn:
        found: StandIn = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("standin", 0),
        )
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __getitem__(self, index: Any) -> Tensor:
        """Lists become tensors below all modes."""
        places = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(each) if isinstance(each, list) else each for each in places))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError("outside of its mode")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        ours = {id(each.inner): each for each in given if isinstance(each, StandIn)}
        if ours and func not in _BETWEEN and any(each.dim() for each in given if not isinstance(each, StandIn)):
            raise RuntimeError(f"{func}: tensors on cuda and on the CPU")
        options = dict(kwargs or {})
        wanted = options.get("device")
        there = bool(ours) if wanted is None else torch.device(wanted).type in ("cuda", "standin")
        if wanted is not None and there:
            options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
        result = _computed(func, *tree_map_only(StandIn, lambda each: each.inner, (args, options)))
        if not there:
            return result
        return tree_map_only(Tensor, lambda each: ours[id(each)] if id(each) in ours else StandIn(each), result)


def _computed(func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    if func is torch.ops.aten.mm.dtype:  # only CUDA has it
        left, right, dtype = args
        assert left.dtype in (torch.bfloat16, torch.float16)
        assert dtype == torch.float32
        return left.to(dtype) @ right.to(dtype)
    return func(*args, **options)


@cache
def _registered() -> None:
    """A backend needs a device of its own in C++, whose name must be unknown to torch."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("standin")


def _made(made: Callable[..., Tensor], value: Any, *, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which looks for the device below all modes."""
    if device is None or torch.device(device).type != "cuda":
        return made(value, device=device, **options)
    return made(value, device="cpu", **options).to(device)


@contextmanager
def cuda_stands_in(monkeypatch: pytest.MonkeyPatch, *, free: float = 1e12) -> Iterator[torch.device]:
    """Yields the device.

    Args:
        monkeypatch: for what torch would ask the driver.
        free: bytes that the device has free.
    """
    _registered()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch, "tensor", partial(_made, torch.tensor))
    monkeypatch.setattr("qexport.quantizing.offloading.free_on_device", lambda device: free)
    with _Mode():
        yield DEVICE
