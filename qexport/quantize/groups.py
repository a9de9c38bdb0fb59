"""Which linear layers of a block are solved together, because a forward that stops knows the inputs of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    """Runs a forward once, and gives the groups in the order of its calls. Layers share the very same tensor.

    Args:
        layers: the modules to group, by name.
        of_experts: the groups that are known beforehand.
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
