"""Speed: what is measured and in which order. No test depends on how fast the machine is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import factories
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.reading.filled_model import unquantized_model
from qexport.reading.stored_model import open_stored
from qexport.verifying import SpeedSettings
from qexport.verifying.speed import (
    MeasuredPace,
    MeasuredSpeed,
    compare_pace,
    compare_speed,
    measure_speed,
    median_interval,
)
from quantized_models import QuantizedModel

CPU = torch.device("cpu")
PROMPT = torch.arange(1, 41).reshape(2, 20)
SETTINGS = SpeedSettings(repeats=6, prompt_tokens=24, new_tokens=4)


def compare(model: QuantizedModel, folder: Path, settings: SpeedSettings = SETTINGS) -> MeasuredSpeed:
    with open_stored(folder, dtype=torch.bfloat16) as artifact:
        return compare_speed(model.checkpoint, artifact, PROMPT, settings, dtype=torch.bfloat16, device=CPU)


@pytest.fixture
def model(tmp_path: Path) -> QuantizedModel:
    """Written without codes."""
    model = QuantizedModel(factories.build(factories.llama_config()))
    factories.save(model.model, tmp_path)
    return model


def test_codes_are_left_to_runtimes(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path)
    found = compare(model, tmp_path)
    assert (found.speed, found.figures) == (None, [])
    assert found.unmeasured is not None
    assert "--through" in found.unmeasured


class Clocked:
    """A runtime with a clock: so long for a prompt, so long for each token, nothing for a prompt that it has kept."""

    def __init__(self, prompt: float, token: float, *, most: int = 1000) -> None:
        self.now, self._prompt, self._token, self._most = 0.0, prompt, token, most
        self.asked = list[tuple[tuple[int, ...], int]]()

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        (prompt,) = map(tuple, prompts)
        kept = prompt in [each for each, _ in self.asked]
        self.asked.append((prompt, new_tokens))
        self.now += (0.0 if kept else self._prompt) + self._token * new_tokens
        return [[7] * min(new_tokens, self._most)]


def through(runtime: Clocked, model: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> MeasuredPace:
    monkeypatch.setattr("qexport.verifying.speed.perf_counter", lambda: runtime.now)
    monkeypatch.setattr("qexport.verifying.speed._times", lambda *_: [0.5, 0.6, 0.7, 0.8])
    ids, dtype = torch.arange(192).reshape(4, 48), torch.bfloat16
    return compare_pace(model.checkpoint, runtime, ids, SETTINGS, dtype=dtype, device=CPU)


def test_a_runtime_is_timed_beside_the_reference(model: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps prompts, which neither the time to the first token nor the speed may gain from."""
    runtime = Clocked(0.2, 0.05)
    found = through(runtime, model, monkeypatch)
    assert found.pace is not None
    assert found.pace.artifact_first_token_seconds == pytest.approx([0.25] * 6)
    assert found.pace.artifact_tokens_per_second == pytest.approx([20.0] * 6)
    assert found.pace.reference_tokens_per_second == pytest.approx([10.0] * 6)
    assert [figure.name for figure in found.figures] == ["speed_ratio", "first_token_ratio"]
    assert [figure.value for figure in found.figures] == pytest.approx([2.0, 0.5])
    assert [new for _, new in runtime.asked] == [1, 1, 4] * 7
    assert {len(prompt) for prompt, _ in runtime.asked} == {24}
    assert len({prompt for prompt, _ in runtime.asked}) == 7


def test_a_runtime_that_ends_early_or_takes_no_time_is_not_measured(
    model: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime in (Clocked(0.2, 0.05, most=3), Clocked(0.2, 0.0)):
        found = through(runtime, model, monkeypatch)
        assert (found.pace, found.figures) == (None, [])
        assert found.unmeasured is not None


def test_both_models_are_measured_as_they_are_loaded(model: QuantizedModel, tmp_path: Path) -> None:
    measured = compare(model, tmp_path)
    found = measured.speed
    assert found is not None
    assert measured.unmeasured is None
    assert (found.prompt_tokens, found.new_tokens) == (24, 4)
    for first_token, tokens_per_second in (
        (found.reference_first_token_seconds, found.reference_tokens_per_second),
        (found.artifact_first_token_seconds, found.artifact_tokens_per_second),
    ):
        assert len(first_token) == len(tokens_per_second) == 6
        assert min(first_token) > 0
        assert min(tokens_per_second) > 0
    dense = sum(parameter.numel() for parameter in model.model.parameters()) * 2
    frequencies = 2 * 4 * 16 // 2  # of the rotary embedding, in float32 and twice: as computed and as it began
    assert found.reference_bytes == dense + frequencies
    assert found.artifact_bytes == found.reference_bytes
    ratios = np.array(found.speed_ratios), np.array(found.first_token_ratios)
    assert np.allclose(ratios[0] * found.reference_tokens_per_second, found.artifact_tokens_per_second)
    assert np.allclose(ratios[1] * found.reference_first_token_seconds, found.artifact_first_token_seconds)
    assert [(figure.name, figure.value) for figure in measured.figures] == [
        ("speed_ratio", np.median(ratios[0])),
        ("first_token_ratio", np.median(ratios[1])),
    ]


def test_models_take_turns_after_one_warm_up_each(model: QuantizedModel) -> None:
    told: list[tuple[str, int]] = []

    def listening(name: str) -> PreTrainedModel:
        built = factories.build(factories.llama_config())
        built.register_forward_pre_hook(
            lambda _, args, kwargs: told.append((name, kwargs["input_ids"].shape[1])), with_kwargs=True
        )
        return built

    measure_speed((listening("r"), listening("a")), PROMPT[:1], SETTINGS)
    assert [name for name, tokens in told if tokens == 20] == list("ra" + "raar" * 3)
    assert len(told) == 2 * 7 * SETTINGS.new_tokens


def test_no_end_token_and_no_penalty_of_the_model_enters(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = list(range(factories.VOCABULARY))
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {everything}, "repetition_penalty": 2.0}}')
    found = compare(model, tmp_path).speed
    assert found is not None
    assert np.isfinite(found.artifact_tokens_per_second).all()


def test_a_slower_model_is_told_from_a_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only their forwards move, since other programs would move a real one too."""
    passed = 0.0

    def taking(seconds: float) -> PreTrainedModel:
        def forward(*_: object) -> None:
            nonlocal passed
            passed += seconds

        model = factories.build(factories.llama_config())
        model.register_forward_pre_hook(forward)
        return model

    monkeypatch.setattr("qexport.verifying.speed.perf_counter", lambda: passed)
    found = measure_speed((taking(0.01), taking(0.05)), PROMPT[:1], SETTINGS)
    assert found.artifact_first_token_seconds == pytest.approx([0.05] * 6)
    assert found.artifact_tokens_per_second == pytest.approx([20.0] * 6)
    speed, first = median_interval(found.speed_ratios), median_interval(found.first_token_ratios)
    assert (speed.low, speed.high) == pytest.approx((0.2, 0.2))
    assert (first.low, first.high) == pytest.approx((5.0, 5.0))


def test_without_room_for_both_nothing_is_measured(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = sum(parameter.numel() for parameter in model.model.parameters()) * 2
    stored = (tmp_path / "model.safetensors").stat().st_size
    needed = 1.25 * (dense + stored)
    for free, measured in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("qexport.verifying.speed.available_memory", lambda _, free=free: free)
        found = compare(model, tmp_path)
        assert (found.speed is not None) == measured
    assert found.unmeasured is not None
    assert "both models together need" in found.unmeasured
    assert found.figures == []


def test_learned_positions_are_not_passed(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.gpt2_config(n_positions=24)))
    model.model.save_pretrained(tmp_path)
    found = compare(model, tmp_path)
    assert found == MeasuredSpeed(None, "28 tokens are more than the 24 positions of the model")


def test_what_two_names_share_is_in_memory_once() -> None:
    tied, apart = (factories.build(factories.llama_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert apart.get_memory_footprint() - tied.get_memory_footprint() == factories.VOCABULARY * 64 * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "falcon rw", "falcon h1", "gpt-neox", "gpt-2", "mixtral"])
@torch.no_grad()
def test_a_dense_model_from_a_source_is_the_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    factories.save(factories.build(factories.FAMILIES[family]), tmp_path)
    checkpoint = load_checkpoint(LoadSettings(base=str(tmp_path)))
    ours = unquantized_model(checkpoint.architecture, checkpoint.weights, dtype=torch.bfloat16, device=CPU)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(ours(PROMPT).logits, theirs(PROMPT).logits)


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (20, 6), (25, 8)])
def test_the_interval_of_a_median_lies_between_tabulated_ranks(count: int, rank: int) -> None:
    """Ranks as in tables of nonparametric intervals for the median, for example Conover's."""
    found = median_interval([float(value) for value in range(count, 0, -1)])
    assert (found.low, found.high) == (rank, count + 1 - rank)
    assert found.value == (count + 1) / 2


def test_five_values_give_no_interval() -> None:
    with pytest.raises(ValueError, match="needs 6 values"):
        median_interval([1.0] * 5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=30))
def test_the_interval_encloses_the_median(values: list[float]) -> None:
    found = median_interval(values)
    assert found.low <= found.value <= found.high


def test_the_interval_of_a_median_covers_it_at_least_at_its_rate() -> None:
    generator = np.random.default_rng(0)
    runs: Any = generator.lognormal(0.0, 1.0, (2000, 7))
    covered = np.mean([found.low <= 1.0 <= found.high for found in map(median_interval, runs)])
    assert covered >= 0.95
