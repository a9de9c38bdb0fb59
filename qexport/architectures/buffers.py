"""The buffers that no checkpoint holds: rotary frequencies and their like."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the non-persistent buffers of a model on the meta device as transformers does.

    Args:
        model: its parameters may still be on the meta device.
        device: where the buffers are wanted.
    """
    empty = []
    for owner_path, owner in model.named_modules():
        for leaf in sorted(owner._non_persistent_buffers_set):
            buffer = owner._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                owner._buffers[leaf] = torch.full_like(buffer, torch.nan, device=device)
                empty.append(f"{owner_path}.{leaf}".lstrip("."))
    for path, module in reversed(list(model.named_modules())):  # a parent may fill the buffers of its children
        if any(name.startswith(f"{path}." if path else "") for name in empty):
            model._init_weights(module)
    for path in empty:
        assert torch.isfinite(model.get_buffer(path)).all(), f"{path} was not computed"
