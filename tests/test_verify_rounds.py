"""How many windows are measured, and on which models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch

import factories
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import GateResult, Verdict
from qexport.gates.deciding import needs_more
from qexport.progress import Progress, Steps
from qexport.verifying import predictors as predicting
from qexport.verifying.rounds import Measured, Models, measure
from quantized_models import QuantizedModel

WINDOWS = torch.randint(factories.VOCABULARY, (13, 8), generator=torch.Generator().manual_seed(3))


@cache
def runner(seed: int) -> BlockRunner:
    model = QuantizedModel(factories.build(factories.llama_config(num_hidden_layers=1), seed=seed))
    return BlockRunner(
        model.checkpoint.architecture, model.checkpoint.weights, dtype=torch.float32, device=torch.device("cpu")
    )


def models(*, rivals: bool = False) -> Models:
    return Models(runner(0), runner(1), *((runner(2), runner(3)) if rivals else ()))


def gate(name: str, verdict: Verdict, figure: str = "mean_kl") -> GateResult:
    return GateResult(
        name=name,
        figure=figure,
        limit=0.1,
        value=0.5,
        low=0.0,
        high=1.0,
        n=4,
        unit="window",
        verdict=verdict,
        reason="so",
    )


def measured(
    decide: Callable[[Measured], Sequence[GateResult]], *, rivals: bool = False, first_look: int = 3
) -> Measured:
    return measure(
        models(rivals=rivals), WINDOWS, first_look, decide, lambda _, gates: needs_more(gates), Steps(lambda _: None)
    )


def test_the_windows_double_from_look_to_look_until_the_budget_is_spent() -> None:
    seen: list[int] = []

    def decide(found: Measured) -> list[GateResult]:
        seen.append(found.windows)
        return [gate("mean_kl", "undecided")]

    found = measured(decide)
    assert found.looks == seen == [3, 6, 12, 13]
    assert found.tokens()["artifact"].kl.shape == (13, 7)


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_no_more_windows_are_taken_once_all_gates_are_decided(verdict: Verdict) -> None:
    found = measured(lambda found: [gate("mean_kl", verdict if found.windows >= 6 else "undecided")])
    assert found.looks == [3, 6]


def test_a_gate_that_no_window_can_decide_asks_for_none() -> None:
    unmeasured = GateResult(name="chrf", figure="chrf", limit=50.0, verdict="undecided", reason="not measured")
    assert measured(lambda found: [unmeasured, gate("mean_kl", "pass")]).looks == [3]


@pytest.mark.parametrize("first_look", [13, 50])
def test_a_first_look_at_everything_is_the_only_one(first_look: int) -> None:
    assert measured(lambda found: [gate("mean_kl", "undecided")], first_look=first_look).looks == [13]


def test_looks_add_up_to_one_measurement() -> None:
    whole = measured(lambda found: [], first_look=13)
    parts = measured(lambda found: [gate("mean_kl", "undecided")])
    one, other = whole.tokens()["artifact"], parts.tokens()["artifact"]
    torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(one.reference_top, other.reference_top)


def test_a_rival_whose_gate_is_decided_rests_and_keeps_the_first_windows() -> None:
    def decide(found: Measured) -> list[GateResult]:
        return [
            gate("better_than_rtn", "pass" if found.windows >= 6 else "undecided", "kl_over_rtn"),
            gate("adapter", "undecided", "kl_over_base"),
            gate("mean_kl", "undecided"),
        ]

    found = measured(decide, rivals=True).tokens()
    assert {name: len(tokens.kl) for name, tokens in found.items()} == {
        "artifact": 13,
        "nearest": 6,
        "base": 13,
        "artifact_from_base": 13,
    }
    alone = measured(lambda found: [], rivals=True, first_look=13).tokens()
    torch.testing.assert_close(found["nearest"].kl, alone["nearest"].kl[:6], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("figure", "nearest", "base"),
    [
        ("rtn_mean_kl", 13, 3),
        ("kl_over_rtn", 13, 3),
        ("adapter_effect", 3, 13),
        ("kl_over_base", 3, 13),
        ("adapter_strength_predictions", 3, 13),
        ("adapter_strength_weights", 3, 3),
        ("mean_kl", 3, 3),
    ],
)
def test_a_rival_runs_while_any_limit_on_its_figures_is_undecided(figure: str, nearest: int, base: int) -> None:
    built_in = [gate("better_than_rtn", "pass", "kl_over_rtn"), gate("adapter", "pass", "kl_over_base")]
    found = measured(
        lambda _: [*built_in, gate("the user's", "undecided", figure), gate("mean_kl", "undecided")], rivals=True
    )
    tokens = found.tokens()
    assert (len(tokens["nearest"].kl), len(tokens["base"].kl)) == (nearest, base)


def test_rivals_run_the_first_windows_of_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 3 * 8)
    monkeypatch.setattr("qexport.verifying.rounds._RIVAL_WINDOWS", 8)
    every = measured(lambda found: [], rivals=True, first_look=13)
    of_rivals = [gate("better_than_rtn", "undecided", "kl_over_rtn"), gate("adapter", "undecided", "kl_over_base")]
    twice = measured(lambda found: of_rivals, rivals=True, first_look=11)
    nine = list(range(9))  # eight, in whole batches of three
    assert every.indices["nearest"] == every.indices["artifact_from_base"] == nine
    assert twice.indices["nearest"] == twice.indices["base"] == [*nine, 11, 12]
    assert twice.indices["artifact"] == list(range(13))
    for name in ("nearest", "base"):
        rival = twice.tokens()[name]
        own = twice.tokens()["artifact"].reference_nll[twice.indices[name]]
        torch.testing.assert_close(rival.reference_nll, own, rtol=1e-6, atol=1e-6)


def test_each_comparison_has_its_own_reference() -> None:
    found = measured(lambda found: [], rivals=True).tokens()
    assert torch.equal(found["base"].artifact_nll, found["artifact_from_base"].reference_nll)
    assert torch.equal(found["artifact"].artifact_nll, found["artifact_from_base"].artifact_nll)
    for name in ("nearest", "base"):
        assert torch.equal(found[name].reference_nll, found["artifact"].reference_nll)
    assert not torch.equal(found["nearest"].kl, found["base"].kl)


def test_progress_knows_each_looks_steps_when_it_begins() -> None:
    events: list[Progress] = []

    def report(event: object) -> None:
        assert isinstance(event, Progress)
        events.append(event)

    undecided = [gate("mean_kl", "undecided")]
    measure(models(), WINDOWS, 3, lambda found: undecided, lambda _, gates: needs_more(gates), Steps(report))
    assert [event.done for event in events if event.detail] == list(range(1, 9))  # a block and a batch in each look
    assert events[-1].done == events[-1].total == 8
    assert events[-1].tokens == 2 * WINDOWS.numel()
    assert [event.detail for event in events if event.detail][:2] == [
        "text through 2 models, block 1 of 1",
        "predictions in 3 windows",
    ]
