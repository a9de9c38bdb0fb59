"""The experts of a mixture, computed in stages at which a forward can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ExpertStop(nn.Module):
    """Where a forward is about to multiply its tokens by the matrices of some experts.

    It is called with the tokens' states [tokens, in], ordered by expert, and the number of tokens of each expert.

    Args:
        parameter: `gate_up_proj` or `down_proj`.
        experts: the experts whose matrices come next.
    """

    def __init__(self, parameter: str, experts: range) -> None:
        super().__init__()
        self.parameter, self.experts = parameter, experts

    def forward(self, states: Tensor, counts: Sequence[int]) -> None:
        """Does nothing."""


def can_stage(module: nn.Module) -> bool:
    """Whether a module computes its experts as `staged` does: transformers' plain gated experts, without biases."""
    plain = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    return all(getattr(module, name, None) is value for name, value in plain.items()) and {
        name for name, _ in module.named_parameters()
    } == {"gate_up_proj", "down_proj"}


@contextmanager
def staged(module: nn.Module, square_bytes: int) -> Iterator[list[ExpertStop]]:
    """Gives an experts' module a forward in two stages: all experts' inputs, then all experts' hidden states.

    The result is that of transformers' eager experts, bit for bit: the same products of the same tokens in the same
    order.

    Args:
        module: one that `can_stage`.
        square_bytes: bytes for the square matrices [in, in] of those experts that one stop announces; one expert is
            announced in any case.
    """
    stops = [
        ExpertStop(name, experts)
        for name in ("gate_up_proj", "down_proj")
        for experts in _portions(module.get_parameter(name), square_bytes)
    ]
    module.forward = _forward(module, stops)
    try:
        yield stops
    finally:
        del module.forward


def _portions(parameter: Tensor, square_bytes: int) -> list[range]:
    count, _, inputs = parameter.shape
    step = max(1, square_bytes // (inputs * inputs * torch.float32.itemsize))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _forward(module: Any, stops: Sequence[ExpertStop]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def products(name: str, states: Tensor, counts: Sequence[int]) -> Tensor:
        parts = states.split(list(counts))
        outputs = []
        for stop in (stop for stop in stops if stop.parameter == name):
            stop(states, counts)
            weights = module.get_parameter(name)
            outputs += [functional.linear(parts[expert], weights[expert]) for expert in stop.experts]
        return torch.cat(outputs)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.t().reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(module.get_parameter("down_proj"))).tolist()
        tokens = order % len(hidden_states)
        gated = module._apply_gate(products("gate_up_proj", hidden_states[tokens], counts))
        outputs = products("down_proj", gated, counts)
        outputs = outputs * top_k_weights.t().reshape(-1)[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, tokens, outputs.to(hidden_states.dtype))

    return forward
