"""Sampling: draws follow the distribution that transformers' own filters leave."""

from __future__ import annotations

from typing import Any

import torch

from qexport.verifying import SamplingSettings
from qexport.verifying.continuation import sampling_noise

LOGITS: Any = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])
IDS: Any = torch.zeros(1, 1, dtype=torch.int64)


def draws(settings: SamplingSettings, count: int = 4000) -> torch.Tensor:
    """How often each token is drawn, as shares."""
    processors = sampling_noise(settings, [f"{index}" for index in range(count)], 0)
    chosen = processors(IDS.expand(count, -1), LOGITS.expand(count, -1).clone()).argmax(-1)
    return torch.bincount(chosen, minlength=5) / count


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    for temperature in (0.7, 1.0, 2.0):
        found = draws(SamplingSettings(temperature=temperature, top_p=1.0))
        expected = torch.softmax(LOGITS / temperature, -1)
        assert (found - expected).abs().max() < 0.03


def test_only_the_likeliest_tokens_up_to_top_p_are_drawn() -> None:
    found = draws(SamplingSettings(top_p=0.8))
    assert found.count_nonzero() == 2
    expected = torch.softmax(LOGITS[:2], -1)
    assert (found[:2] - expected).abs().max() < 0.03


def test_steps_draw_anew_and_a_seed_repeats_them() -> None:
    def steps(seed: int, sample: int = 0) -> list[int]:
        processors = sampling_noise(SamplingSettings(seed=seed), ["a"], sample)
        return [int(processors(IDS, LOGITS[None].clone()).argmax()) for _ in range(40)]

    assert steps(1) == steps(1)
    assert len(set(steps(1))) > 1
    assert steps(1) != steps(2)
    assert steps(1) != steps(1, sample=1)


def test_noise_begins_at_any_position_with_what_is_drawn_there() -> None:
    settings = SamplingSettings(seed=1)
    whole, late = sampling_noise(settings, ["a", "b"], 0), sampling_noise(settings, ["b", "a"], 0, [3, 1])
    steps = [whole(IDS, LOGITS.expand(2, -1).clone()) for _ in range(6)]
    found = [late(IDS, LOGITS.expand(2, -1).clone()) for _ in range(3)]
    for place, (own, other) in enumerate(found):
        assert torch.equal(own, steps[3 + place][1])
        assert torch.equal(other, steps[1 + place][0])
