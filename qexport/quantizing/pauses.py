"""A block's forward that stops at chosen layers, and the layers of each stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from qexport.quantizing.parking import Parking


class PausedForward(greenlet):
    """One batch's forward, run on its own stack until the next module that `pausing_at` names.

    A greenlet and not a thread: everything stays on one operating system thread, with one pool of workers for torch.
    The bits of its products do not depend on the number of threads.

    Args:
        forward: what is run.
        parking: of all forwards that are stopped at the same time.
    """

    def __init__(self, forward: Callable[[], None], parking: Parking) -> None:
        super().__init__(forward)
        self._parking = parking

    def advance(self) -> tuple[Any, ...]:
        """Continues to the next module that pauses, and returns the arguments of its call, which are in memory."""
        args = self._go_on()
        assert isinstance(args, tuple), "the forward ended before the expected module"
        self._parking.restore(args)
        return args

    def finish(self) -> None:
        """Continues to the end."""
        self._go_on()
        assert self.dead, "the forward paused once more than expected"

    def _go_on(self) -> object:
        with self._parking:
            return self.switch()


@contextmanager
def pausing_at(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Makes every `PausedForward` stop before each of these modules. Other forwards do not stop."""

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


@dataclass(frozen=True)
class Group:
    """Layers whose inputs are known when a forward is about to call one module.

    Attributes:
        stop: that module: the first of the layers, or an `ExpertStop`.
        members: the names of the layers that share an input, one tuple for each input.
        experts: for an `ExpertStop`, the expert of each of `members`.
    """

    stop: nn.Module
    members: tuple[tuple[str, ...], ...]
    experts: tuple[int, ...] | None = None

    def inputs(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The input of each of `members` [..., tokens, in], from what `stop` is called with."""
        if self.experts is None:
            return [args[0]]
        states, counts = args
        parts = states.split(list(counts))
        return [parts[expert] for expert in self.experts]


def find_groups(
    layers: Mapping[str, nn.Module], of_experts: Sequence[Group], forward: Callable[[], None]
) -> list[Group]:
    """Runs a forward once, and returns the groups in the order of its calls. Layers of a group get the same tensor.

    Args:
        layers: the modules to group, by name.
        of_experts: the groups of the block's experts, which are known beforehand.
        forward: runs the block.
    """
    inputs: list[Tensor | None] = []
    groups: list[Group] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            for index, seen in enumerate(inputs):
                if seen is args[0]:
                    groups[index] = Group(groups[index].stop, ((*groups[index].members[0], name),))
                    return
            inputs.append(args[0])
            groups.append(Group(layer, ((name,),)))

        return hook

    def note_experts(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            inputs.append(None)
            groups.append(group)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    hooks += [group.stop.register_forward_pre_hook(note_experts(group)) for group in of_experts]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return groups
