"""A block's forward that stops at chosen layers, so that each layer is computed once, with its quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from qexport.quantize.parking import Parking


class PausedForward(greenlet):
    """One batch's forward, run on a stack of its own until the next layer that `pausing_at` names.

    A greenlet and not a thread: everything stays on one operating system thread, with one pool of workers for torch.
    """

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(forward)
        self._give_back: list[Callable[[], None]] = []

    def advance(self) -> tuple[Any, ...]:
        """Goes on to the next module that pauses, and returns what it is called with."""
        args = self._go_on()
        assert isinstance(args, tuple), "the forward ended before the module that was awaited"
        return args

    def park(self, parking: Parking, tensors: Iterable[Tensor]) -> None:
        """Moves tensors that only this forward needs out of memory, until it goes on."""
        for tensor in tensors:
            self._give_back.append(parking.park(tensor))

    def finish(self) -> None:
        """Goes on to the end."""
        self._go_on()
        assert self.dead, "the forward paused once more than was awaited"

    def _go_on(self) -> object:
        while self._give_back:  # the last one first: two of the tensors may share a storage
            self._give_back.pop()()
        return self.switch()


@contextmanager
def pausing_at(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Makes every `PausedForward` stop before each of these modules. Other forwards pass."""

    def pause(_: nn.Module, args: tuple[Any, ...]) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, PausedForward) and current.parent is not None:
            current.parent.switch(args)

    hooks = [module.register_forward_pre_hook(pause) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
