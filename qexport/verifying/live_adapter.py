"""The merged model compared with the base and the adapter, applied live by PEFT: the proof that the merge is right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.hidden_packages import hidden
from qexport.progress import Steps
from qexport.verifying.divergence import TokenFigures, compare_logits
from qexport.verifying.memory import available_memory, needed_memory
from qexport.verifying.predictors import windows_at_once

if TYPE_CHECKING:
    from peft import PeftModel

WINDOWS: Final = 16
"""Windows of the held-out text: enough to separate the noise of two computations from three times the noise floor."""

_TOKENS: Final = 64
"""Tokens of each window."""

_MISSING: Final = "missing adapter keys"


@dataclass(frozen=True)
class LiveAdapter:
    """What is needed to run the adapter in PEFT.

    Attributes:
        base: the model without the adapter.
        folder: the adapter's.
    """

    base: Checkpoint
    folder: Path


class NotMeasured(Exception):
    """Why the merge could not be compared with PEFT.

    The text goes into the manifest, so PEFT's own message, which may contain paths, is only in the exception's cause.
    """


def compare_merge(
    merged: Checkpoint,
    live: LiveAdapter,
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: Steps,
) -> TokenFigures:
    """The figures of the merged model, with base and adapter as PEFT computes them as the reference.

    Only one whole model is in memory at a time, and the first one's logits. Only the beginnings of some windows are
    used: hundreds of tokens are enough to see that an adapter is missing or wrong.

    Args:
        merged: the merged model.
        live: base and adapter.
        input_ids: int64 [windows, sequence_length].
        dtype: what both compute in. In a dtype wider than the merged model's, the rounding of the merge is the only
            difference left.
        device: where to compute.
        steps: counts the steps.

    Raises:
        NotMeasured: a whole model does not fit in memory, or PEFT cannot load the adapter into this base.
    """
    ids = input_ids[:WINDOWS, :_TOKENS]
    runners = [BlockRunner(each.architecture, each.weights, dtype=dtype, device=device) for each in (live.base, merged)]
    if needed_memory(runners[1]) + _logits_bytes(runners[1], ids) > available_memory(device):
        raise NotMeasured("the whole model does not fit in memory")
    steps.expect(2)
    own = _live_logits(runners[0], live.folder, ids)
    steps.finished("base and adapter in PEFT", ids.numel())
    with runners[1].whole() as model:
        other = _logits(model, ids, device)
    steps.finished("the merged model", ids.numel())
    (figures,) = compare_logits([own, other], [(0, 1)], ids[:, 1:].flatten())
    return figures.reshape(len(ids))


@hidden("bitsandbytes")
def _live_logits(base: BlockRunner, adapter: Path, ids: Tensor) -> Tensor:
    with base.whole() as model:
        live = _with_adapter(model, adapter)
        try:
            live.eval()
            with _head_in_float32(model):
                return _logits(live, ids, base.device)
        except Exception as error:  # PEFT raises exceptions of any type
            raise NotMeasured("PEFT cannot run the adapter") from error
        finally:
            live.unload()


@contextmanager
def _head_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """PEFT's layer around a tied head computes the product itself, without the hook that widens the head's inputs."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].to(torch.float32), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """PEFT only warns about missing tensors, and would leave their layers as they are in the base."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            live = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        except Exception as error:  # PEFT raises exceptions of any type
            raise NotMeasured("PEFT cannot load the adapter") from error
    if any(_MISSING in str(warning.message) for warning in heard):
        live.unload()
        raise NotMeasured("PEFT does not find all tensors of the adapter")
    return live


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """float32 [predicted tokens, vocabulary], on the CPU."""
    parts = [
        model(input_ids=part.to(device), use_cache=False).logits[:, :-1].float().flatten(0, 1).cpu()
        for part in ids.split(windows_at_once(ids.shape[1]))
    ]
    return torch.cat(parts)


def _logits_bytes(runner: BlockRunner, ids: Tensor) -> int:
    return 2 * ids.numel() * runner.structure.vocab_size * torch.float32.itemsize
