"""The buffers that no checkpoint holds: rotary frequencies and their like."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qexport.architectures.structure import Structure


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, structure: Structure, device: torch.device) -> None:
    """Fills the buffers of a model on the meta device that `structure.parameters` does not name, as transformers does.

    Args:
        model: its parameters may still be on the meta device.
        structure: the model's.
        device: where the buffers are wanted.
    """
    stored = set(structure.parameters)
    for path, module in model.named_modules():
        leaves = [leaf for leaf in module._buffers if f"{path}.{leaf}".lstrip(".") not in stored]
        empty = [leaf for leaf in leaves if (buffer := module._buffers[leaf]) is not None and buffer.is_meta]
        for leaf in empty:
            buffer = module._buffers[leaf]
            assert buffer is not None
            module._buffers[leaf] = torch.full_like(buffer, torch.nan, device=device)
        if empty:
            model._init_weights(module)
        for leaf in empty:
            buffer = module._buffers[leaf]
            assert buffer is not None
            assert torch.isfinite(buffer).all(), f"{path}.{leaf} was not computed"
