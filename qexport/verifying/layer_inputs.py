"""What goes into the reference's linear layers, kept until the artifact's layers are compared with them."""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from qexport.architectures.runner import BlockRunner

_TOKENS: Final = 256
"""The tokens that are kept, spread evenly over the first batch of windows. A block's inputs then take some 40 MB where
the hidden size is 4096."""


class LayerInputs:
    """A sample of the inputs of linear layers, each taken when its layer is run for the first time.

    Args:
        runner: the model. Experts, whose tokens differ, and layers outside the blocks are left out.
        weights: the weights of the layers, by their names in files.
    """

    def __init__(self, runner: BlockRunner, weights: Container[str]) -> None:
        self._kept: dict[str, Tensor] = {}
        self._hooks = {
            name: runner.module(linear).register_forward_pre_hook(partial(self._keep, name))
            for linear in runner.structure.block_linears
            if (name := f"{linear.name}.weight") in weights and runner.part(linear).expert is None
        }

    def take(self, weight: str) -> Tensor | None:
        """float32 [tokens, in] on the CPU; None if the layer has not been run or is left out. It is not kept on."""
        return self._kept.pop(weight, None)

    def close(self) -> None:
        """Ends the watching of layers that have not been run."""
        for hook in self._hooks.values():
            hook.remove()
        self._kept.clear()

    def _keep(self, weight: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].is_meta:  # a run that only finds out what the blocks return
            return
        self._hooks.pop(weight).remove()
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
        sample = tokens[:: max(1, len(tokens) // _TOKENS)][:_TOKENS]
        self._kept[weight] = sample.to("cpu", torch.float32, copy=True)
