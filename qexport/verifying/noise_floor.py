"""How far the reference is from itself, computed in a wider dtype: smaller differences mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qexport.architectures.runner import BlockRunner
from qexport.tensors import Checkpoint
from qexport.verifying.divergence import compare
from qexport.verifying.estimates import Units, divergence_figures
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.predictors import predictors
from qexport.verifying.steps import Steps

TOKENS: Final = 1024
"""Enough: the divergence between two dtypes is nearly the same on every text."""

_WINDOWS: Final = 2
"""At least, whatever their length."""


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for models in 16 bits, float64 for those in 32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def noise_floor(
    reference: Checkpoint,
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: Steps,
) -> Mapping[str, float]:
    """Every teacher-forced figure of the reference against the same weights computed in a wider dtype.

    Args:
        reference: the merged model.
        input_ids: int64 [windows, sequence_length]; the first ones are taken, `TOKENS` in them.
        dtype: what the blocks compute in.
        device: where to compute.
        steps: is told of each.

    Returns:
        The figures' values by their names.
    """
    ids = input_ids[: max(_WINDOWS, math.ceil(TOKENS / input_ids.shape[1]))]
    runners = [_runner(reference, kind, device) for kind in (dtype, wider(dtype))]
    steps.expect(len(runners[0].structure.blocks))
    batches, _ = run_in_lockstep(
        runners, ids, lambda block: steps.finished(f"noise floor, block {block}", 2 * ids.numel()), drift=False
    )
    with predictors(runners, batches) as models:
        (tokens,) = compare(models, [(0, 1)], ids, lambda _: None)
    units = Units([None] * len(ids), "window", tokens.kl.shape[1], len(ids))
    return {figure.name: figure.value for figure in divergence_figures(tokens, units)}


def _runner(reference: Checkpoint, dtype: torch.dtype, device: torch.device) -> BlockRunner:
    config: dict[str, Any] = {**reference.config, "dtype": str(dtype).removeprefix("torch.")}
    return BlockRunner(config, reference.weights, dtype=dtype, device=device)
