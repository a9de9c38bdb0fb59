"""How far hidden states drift apart, block by block, against whole models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import factories
from qexport.architectures.architecture import Architecture
from qexport.architectures.runner import BlockRunner
from qexport.verifying import predictors as predicting
from qexport.verifying.lockstep import run_in_lockstep
from quantized_models import QuantizedModel, Tensors

BLOCKS = 4
WINDOWS = torch.randint(factories.VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(3))


@cache
def intact() -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config(num_hidden_layers=BLOCKS), dtype=torch.float32))


def tensors(changes: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    return {**intact().model.state_dict(), **(changes or {})}


def corrupted(block: int) -> dict[str, torch.Tensor]:
    name = f"model.layers.{block}.mlp.down_proj.weight"
    return tensors({name: tensors()[name].flip(1)})


def runner(weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> BlockRunner:
    config = {**intact().checkpoint.config, "dtype": str(dtype).removeprefix("torch.")}
    return BlockRunner(Architecture(config), Tensors(weights), dtype=dtype, device=torch.device("cpu"))


def drift(weights: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> list[float]:
    return run_in_lockstep([runner(tensors(), dtype), runner(weights, dtype)], WINDOWS, lambda _: None)[1]


def hidden_states(weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Behind each block; transformers puts the final norm into the last of `hidden_states`, so blocks are hooked."""
    model: PreTrainedModel = factories.build(intact().model.config, dtype=torch.float32)
    model.load_state_dict(dict(weights))
    found: list[torch.Tensor] = []
    for layer in model.get_submodule("model.layers").children():
        layer.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(WINDOWS)
    return found


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_corrupted_block_is_the_first_where_drift_shows(block: int, dtype: torch.dtype) -> None:
    found = drift(corrupted(block), dtype)
    assert found[:block] == [0.0] * block
    assert all(error > 0.02 for error in found[block:])


def test_drift_is_that_of_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 2 * 12)
    ours, theirs = hidden_states(tensors()), hidden_states(corrupted(1))
    expected = [float((one - two).norm() / one.norm()) for one, two in zip(ours, theirs, strict=True)]
    assert drift(corrupted(1)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_measuring_drift_leaves_the_hidden_states_as_they_are() -> None:
    (batches, _), _ = run_in_lockstep([runner(tensors()), runner(corrupted(0))], WINDOWS, lambda _: None)
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), hidden_states(tensors())[-1])


def test_states_beyond_the_squares_of_float32_still_have_a_drift() -> None:
    name = "model.embed_tokens.weight"
    models = [runner(tensors({name: tensors()[name] * scale})) for scale in (1e25, 1.01e25)]
    drifts = run_in_lockstep(models, WINDOWS, lambda _: None)[1]
    assert drifts == pytest.approx([0.01] * BLOCKS, rel=1e-3)


def test_a_third_model_may_run_fewer_windows() -> None:
    models = [runner(tensors()), runner(corrupted(0)), runner(corrupted(1))]
    batches, _ = run_in_lockstep(models, WINDOWS, lambda _: None, windows=[5, 5, 2])
    rows = [torch.cat([batch.hidden for batch in own]) for own in batches]
    assert [len(own) for own in rows] == [5, 5, 2]
    torch.testing.assert_close(rows[2], hidden_states(corrupted(1))[-1][:2], rtol=1e-5, atol=1e-5)
