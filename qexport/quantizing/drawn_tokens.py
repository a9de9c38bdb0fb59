"""Gradients of the log-probabilities of tokens that are drawn from the model's own predictions.

Their mean square is the Fisher information, which is the curvature of the KL divergence: what a change of the model
costs, to second order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from qexport.architectures.devices import single_thread
from qexport.architectures.memory import return_freed_memory_beyond
from qexport.architectures.runner import BlockRunner
from qexport.errors import NumericalError

_SEED: Final = 0
"""Of the tokens that are drawn."""

_GROWTH: Final = 48 << 20
"""Bytes that the process may grow by before freed memory is returned."""


def states_before(pieces: Iterable[int], vocabulary: int) -> Iterator[Tensor]:
    """The generator's states before the draws of each piece, for who draws from a later piece on. It takes most
    of the time of the draws: as many values must be taken from the generator.

    Args:
        pieces: the tokens of each, as they are given to `gradients_at_head`.
        vocabulary: tokens that may be drawn.
    """
    generator = torch.Generator().manual_seed(_SEED)
    for tokens in pieces:
        yield generator.get_state()
        torch.empty(tokens, vocabulary).exponential_(generator=generator)  # as torch.multinomial does


def gradients_at_head(
    runner: BlockRunner, hidden: Iterable[Tensor], states: Mapping[int, Tensor] = MappingProxyType({})
) -> list[Tensor]:
    """The gradients of the sum of the drawn tokens' log-probabilities with respect to hidden states.

    Args:
        runner: has the head.
        hidden: after the last block, [1, tokens, hidden_size] each. The logits of one are in memory at a time.
        states: of the generator before the draws of some of these, by their numbers, see `states_before`; else it goes
            on, from its seed at the first.

    Returns:
        Of the shape and dtype of each.

    Raises:
        NumericalError: the model's predictions are not finite.
    """
    generator, found = torch.Generator().manual_seed(_SEED), []
    with runner.head() as head, single_thread():
        for number, part in enumerate(hidden):
            if number in states:
                generator.set_state(states[number])
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                predicted = head(leaf)[0].log_softmax(-1)
                probabilities = predicted.detach().exp().cpu()
                if not bool(torch.isfinite(probabilities).all()):
                    raise NumericalError("the merged model's predictions are not finite", where="quantize.calibration")
                drawn = torch.multinomial(probabilities, 1, generator=generator).to(runner.device)
                (gradient,) = torch.autograd.grad(predicted.gather(1, drawn).sum(), leaf)
            found.append(gradient)
            del leaf, predicted, probabilities, drawn, gradient
            return_freed_memory_beyond(_GROWTH)
    return found
