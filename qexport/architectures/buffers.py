"""The buffers that no checkpoint holds: rotary frequencies and their like."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qexport.errors import CompatibilityError, listed


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the non-persistent buffers of a model on the meta device as transformers does.

    Args:
        model: its parameters may still be on the meta device.
        device: where the buffers are wanted.

    Raises:
        CompatibilityError: transformers fills one in another way than by initializing its module.
    """
    empty = {
        f"{path}.{leaf}".lstrip("."): buffer
        for path, owner in model.named_modules()
        for leaf in sorted(owner._non_persistent_buffers_set)
        if (buffer := owner._buffers[leaf]) is not None and buffer.is_meta
    }
    computed = [_computed(model, empty, device, before) for before in (0, 1)]
    if left := [name for name in empty if not torch.equal(computed[0][name], computed[1][name])]:
        raise CompatibilityError(
            "transformers does not compute these buffers when it initializes their modules",
            where=listed(left),
            mend="this family needs an entry in qexport/architectures",
        )


def _computed(model: PreTrainedModel, empty: dict[str, Tensor], device: torch.device, before: int) -> dict[str, Tensor]:
    """The buffers after transformers has initialized their modules. Floating ones are not a number before."""
    for name, buffer in empty.items():
        path, _, leaf = name.rpartition(".")
        value = torch.nan if buffer.is_floating_point() else before
        model.get_submodule(path)._buffers[leaf] = torch.full_like(buffer, value, device=device)
    for path, module in reversed(list(model.named_modules())):  # a parent may fill the buffers of its children
        if any(name.startswith(f"{path}." if path else "") for name in empty):
            model._init_weights(module)
    return {name: model.get_buffer(name) for name in empty}
