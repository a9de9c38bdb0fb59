"""The buffers that no checkpoint holds: rotary frequencies and their like."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the buffers of a model on the meta device that checkpoints do not hold, as transformers does.

    Args:
        model: its parameters must still be on the meta device: what fills buffers may also draw random weights.
        device: where the buffers are wanted.
    """
    stored = set(model.state_dict())
    empty = {path: buffer for path, buffer in model.named_buffers() if path not in stored and buffer.is_meta}
    for path, buffer in empty.items():
        module, _, leaf = path.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = torch.full_like(buffer, torch.nan, device=device)
    for path, module in reversed(list(model.named_modules())):  # a parent may fill the buffers of its children
        if any(name.startswith(f"{path}." if path else "") for name in empty):
            model._init_weights(module)
    for path in empty:
        assert torch.isfinite(model.get_buffer(path)).all(), f"{path} was not computed"
