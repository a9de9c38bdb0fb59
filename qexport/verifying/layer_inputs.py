"""What goes into the reference's linear layers, kept until the artifact's layers are compared with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import LinearSpec
from qexport.verifying.kept import NOTHING_KEPT, Kept

_TOKENS: Final = 256
"""The tokens that are kept, spread evenly over the first batch of windows. A block's inputs then take some 40 MB where
the hidden size is 4096."""


@dataclass(frozen=True)
class KeptInputs:
    """What the comparisons of other artifacts with the same reference have left, and this one leaves.

    Attributes:
        kept: the files.
        windows: JSON values that tell which windows go through the reference first.
    """

    kept: Kept = NOTHING_KEPT
    windows: Any = None

    def has(self, weight: str) -> bool:
        """Whether a layer's inputs are there."""
        return self.kept.has("inputs", self._key(weight))

    def read(self, weight: str) -> Tensor | None:
        """A layer's inputs [tokens, in] in the reference's dtype; None if they were not kept."""
        found = self.kept.tensors("inputs", self._key(weight))
        return None if found is None else found["inputs"]

    def keep(self, weight: str, inputs: Tensor) -> None:
        """Keeps a layer's inputs."""
        self.kept.keep_tensors("inputs", self._key(weight), {"inputs": inputs})

    def _key(self, weight: str) -> Any:
        return {"weight": weight, "windows": self.windows}


NO_KEPT_INPUTS: Final = KeptInputs()


class LayerInputs:
    """A sample of the inputs of linear layers, each from the first time that its layer is run.

    Args:
        runner: the model. Experts, whose tokens differ, and layers outside the blocks are left out.
        weights: the weights of the layers, by their names in files.
        others: where the inputs are read that are known, and others are kept.

    Attributes:
        known: all of them are there, so the model need not be run for them.
    """

    def __init__(self, runner: BlockRunner, weights: Collection[str], others: KeptInputs = NO_KEPT_INPUTS) -> None:
        self._kept: dict[str, Tensor] = {}
        self._others = others
        self._missing = {
            block: {
                name: linear
                for linear in linears
                if (name := f"{linear.name}.weight") in weights and runner.part(linear).expert is None
            }
            for block, linears in runner.structure.linears.items()
        }
        self.known = all(others.has(name) for linears in self._missing.values() for name in linears)
        if self.known:
            self._missing = {}

    def wanted(self, block: str) -> Sequence[LinearSpec]:
        """The layers of a block whose inputs are missing."""
        return list(self._missing.get(block, {}).values())

    def receive(self, block: str, inputs: Mapping[str, Tensor]) -> None:
        """Takes over the inputs of layers of a block, by the names of their weights."""
        for weight, tokens in inputs.items():
            del self._missing[block][weight]
            self._kept[weight] = tokens
            self._others.keep(weight, tokens)

    def take(self, weight: str) -> Tensor | None:
        """float32 [tokens, in] on the CPU; None if the layer has not been run or is left out. It is not kept on."""
        found = self._others.read(weight) if self.known else self._kept.pop(weight, None)
        return None if found is None else found.to(torch.float32)


@contextmanager
def sampled(runner: BlockRunner, linears: Sequence[LinearSpec]) -> Iterator[dict[str, Tensor]]:
    """Samples of what layers receive within the context, from the first batch of windows that they are run on: by the
    names of their weights, [tokens, in] on the CPU.
    """
    found: dict[str, Tensor] = {}
    hooks = [
        runner.module(linear).register_forward_pre_hook(partial(_sample, found, f"{linear.name}.weight"))
        for linear in linears
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _sample(found: dict[str, Tensor], weight: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    if weight not in found:
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
        found[weight] = tokens[:: max(1, len(tokens) // _TOKENS)][:_TOKENS].to("cpu", copy=True)
