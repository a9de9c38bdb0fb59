"""Continuations that are found block by block from guesses, against transformers' own `generate`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PretrainedConfig, PreTrainedModel

import factories
from live_bytes import LiveBytes
from qexport.architectures.architecture import Architecture
from qexport.architectures.runner import BlockRunner
from qexport.errors import NumericalError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.progress import Progress, Steps, silent
from qexport.text.prompts import EncodedPrompts, Prompt, PromptSet
from qexport.verifying import SamplingSettings, decoding
from qexport.verifying.continuing import Both, Task, continue_by_blocks, continue_whole
from qexport.verifying.decoding import Draft, Drafter, Text, decode, keep_guesses
from quantized_models import Tensors

CPU = torch.device("cpu")
LENGTHS = (3, 17, 5, 40, 1, 17)
LIMIT = 8
NOISE = 0.15
"""Nats: what rounding to bfloat16 moves in these models, far below a decision."""


def inputs_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, factories.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def settings_of(*ends: int, limit: int = LIMIT) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=[0, *ends], pad_token_id=0)


def runner_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> BlockRunner:
    """Runs a model that has one tensor in memory for each in files."""
    return BlockRunner(Architecture(model.config.to_dict()), Tensors(dict(model.state_dict())), dtype=dtype, device=CPU)


def no_noise(_: object) -> LogitsProcessorList:
    return LogitsProcessorList()


def texts_of(inputs: Sequence[Sequence[int]], limit: int = LIMIT) -> list[Text]:
    return [Text(index, None, ids, [0] * limit) for index, ids in enumerate(inputs)]


@dataclass(frozen=True)
class Decoded:
    tokens: list[list[int]]
    margins: list[list[float]]
    passes: int


def decoded(runner: BlockRunner, texts: Sequence[Text], settings: GenerationConfig, draft: Draft) -> Decoded:
    draft(texts)
    passes = decode(runner, texts, settings, no_noise, draft, Steps(silent), "reference")
    assert all(text.ended for text in texts)
    return Decoded([text.tokens for text in texts], [text.margins for text in texts], passes)


@torch.no_grad()
def alone(model: Any, ids: Sequence[int], settings: GenerationConfig) -> list[int]:
    """What transformers generates for one prompt."""
    found: list[int] = model.generate(torch.tensor([list(ids)]), generation_config=settings)[0, len(ids) :].tolist()
    return found


@torch.no_grad()
def margins_along(model: Any, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
    logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
    best = logits.topk(2).values
    found: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return found


def blurred(model: PreTrainedModel, amount: float = 0.02) -> PreTrainedModel:
    """A worse model, as an artifact is: it often chooses as the first one does."""
    worse, generator = deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in worse.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
            parameter.add_((amount * noise).to(parameter.dtype))
    return worse


@pytest.mark.parametrize("name", factories.FAMILIES)
def test_the_texts_are_those_that_the_whole_model_generates(name: str, tmp_path: Path) -> None:
    model = factories.build(factories.FAMILIES[name], dtype=torch.float32)
    checkpoint = load_checkpoint(LoadSettings(base=str(factories.save(model, tmp_path))))
    runner = BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=torch.float32, device=CPU)
    whole, inputs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), inputs_of()
    settings = settings_of(alone(whole, inputs[1], settings_of())[3])
    expected = [alone(whole, ids, settings) for ids in inputs]
    assert {len(tokens) for tokens in expected} > {LIMIT}, "some end earlier"

    positions = runner.structure.positions
    drafter = Drafter(blurred(model), positions, settings, no_noise)
    drafted = decoded(runner, texts_of(inputs), settings, drafter)
    guessed = decoded(runner, texts_of(inputs), settings, keep_guesses)
    assert drafted.tokens == guessed.tokens == expected
    assert drafted.passes < guessed.passes <= LIMIT
    for ids, tokens, margins in zip(inputs, drafted.tokens, drafted.margins, strict=True):
        assert margins == pytest.approx(margins_along(whole, ids, tokens), abs=1e-4)


@cache
def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return factories.build(factories.llama_config(**changes), dtype=dtype)


@cache
def worse_llama() -> PreTrainedModel:
    return blurred(llama())


@cache
def true_texts() -> list[list[int]]:
    return [alone(llama(), ids, settings_of()) for ids in inputs_of()]


class Knowing:
    """Drafts the true texts, each with an error at some of the places."""

    def __init__(self, errors: Sequence[set[int]]) -> None:
        self.errors = errors

    def __call__(self, texts: Sequence[Text]) -> None:
        for text in texts:
            known = true_texts()[text.prompt]
            wrong = [token ^ 1 if at in self.errors[text.prompt] else token for at, token in enumerate(known)]
            text.guess_next(wrong[len(text.tokens) :])


ERRORS = [set[int](), {0}, {7}, {2, 3}, {4, 5, 6}, {1}]


@pytest.mark.parametrize("errors", [[set[int]()] * 6, ERRORS, [set(range(LIMIT))] * 6], ids=["none", "some", "all"])
def test_each_wrong_guess_costs_one_pass(errors: Sequence[set[int]]) -> None:
    found = decoded(runner_of(llama()), texts_of(inputs_of()), settings_of(), Knowing(errors))
    assert found.tokens == true_texts()
    longest = max(map(len, true_texts()))
    costs = [len({at for at in wrong if at < len(text) - 1}) for wrong, text in zip(errors, true_texts(), strict=True)]
    assert found.passes == 1 + max(costs)
    assert longest == LIMIT


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(factories.llama_config(), torch.bfloat16), (factories.falcon_h1_config(), torch.float32)],
    ids=["llama", "falcon h1"],
)
def test_guesses_change_no_bit_of_the_result(config: PretrainedConfig, dtype: torch.dtype) -> None:
    model = factories.build(config, dtype=torch.float32)
    runner, settings, worse = runner_of(model, dtype), settings_of(limit=5), blurred(model, 0.3)
    ways: list[Draft] = [
        keep_guesses,
        Drafter(model, None, settings, no_noise),
        Drafter(worse, None, settings, no_noise),
    ]
    first, *others = (decoded(runner, texts_of(inputs_of()), settings, draft) for draft in ways)
    for other in others:
        assert (other.tokens, other.margins) == (first.tokens, first.margins)
    assert len({first.passes, *(other.passes for other in others)}) > 1


def test_in_bfloat16_only_near_ties_fall_otherwise_than_with_the_whole_model() -> None:
    runner, inputs = runner_of(llama(), torch.bfloat16), inputs_of()
    found = decoded(runner, texts_of(inputs), settings_of(), keep_guesses)
    with runner.whole() as model:
        expected = [alone(model, ids, settings_of()) for ids in inputs]
    different = 0
    for ours, theirs, margins in zip(found.tokens, expected, found.margins, strict=True):
        at = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        assert at is None or margins[at] < NOISE
        different += at is not None
    assert different < len(inputs)


def test_more_texts_than_one_pass_holds_are_read_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PASS_TOKENS", 60)
    monkeypatch.setattr(decoding, "_BATCH_TOKENS", 30)
    found = decoded(runner_of(llama()), texts_of(inputs_of()), settings_of(), Knowing([set[int]()] * 6))
    assert found.tokens == true_texts()
    assert found.passes == 3


def test_a_draft_that_goes_on_is_used_again() -> None:
    calls: list[int] = []

    class Counting(Drafter):
        def _draft_batch(self, texts: Sequence[Text], batch: Any) -> None:
            calls.append(len(texts))
            super()._draft_batch(texts, batch)

    drafter = Counting(llama(), None, settings_of(), no_noise)
    texts = texts_of(inputs_of())
    drafter(texts)
    for text in texts:
        assert list(text.guess[: len(true_texts()[text.prompt])]) == true_texts()[text.prompt]
        text.guess, text.tokens = [0] * LIMIT, list(true_texts()[text.prompt][:2])
        text.guess_next([])
    drafter(texts)
    assert sum(calls) == len(texts)
    assert [list(text.guess[: len(known)]) for text, known in zip(texts, true_texts(), strict=True)] == true_texts()
    texts[0].tokens[1] ^= 1
    drafter(texts[:1])
    assert calls[-1] == 1


def test_drafts_stay_within_learned_positions() -> None:
    model = factories.build(factories.gpt2_config(n_positions=48), dtype=torch.float32)
    inputs = inputs_of((40, 39, 40))
    texts = texts_of(inputs)
    for text, count in zip(texts, (6, 1, 3), strict=True):
        text.tokens = alone(model, text.input_ids, settings_of())[:count]
    Drafter(model, 48, settings_of(), no_noise)(texts)
    for text in texts:
        assert len(text.guess) == LIMIT
        assert text.guess[len(text.tokens)] == alone(model, text.input_ids, settings_of())[len(text.tokens)]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    broken = deepcopy(llama())
    broken.state_dict()["model.norm.weight"].fill_(torch.nan)
    with pytest.raises(NumericalError, match="NaN"):
        decoded(runner_of(broken), texts_of(inputs_of()), settings_of(), keep_guesses)


def peak_bytes(layers: int, draft: Draft = keep_guesses) -> int:
    runner = runner_of(llama(num_hidden_layers=layers))
    texts = texts_of(inputs_of((9, 30)), 2)
    gc.collect()
    with LiveBytes() as live:
        decode(runner, texts, settings_of(limit=2), no_noise, draft, Steps(silent), "reference")
    return int(live.peak)


def test_the_peak_of_memory_does_not_grow_with_the_number_of_blocks() -> None:
    small = peak_bytes(2)
    assert peak_bytes(6) == small

    kept: list[torch.Tensor] = []

    def keeping(texts: Sequence[Text]) -> None:
        kept.extend(torch.ones(2000) for _ in texts)

    assert peak_bytes(2, keeping) > small, "the measure sees what is kept"


def task_of(sampling: SamplingSettings | None = None, steps: Steps | None = None) -> Task:
    inputs = inputs_of()
    prompts = tuple(Prompt(f"p{index}", "") for index in range(len(inputs)))
    encoded = EncodedPrompts(PromptSet(prompts, "prompts.jsonl"), prompts, tuple(inputs), {})
    return Task(encoded, settings_of(), sampling, steps or Steps(silent))


class Graph:
    """A model without blocks."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner, self.opened = runner, 0

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        self.opened += 1
        return self._runner.whole()


TWICE = SamplingSettings(seed=5, temperature=0.7, samples=2)


@cache
def whole_texts() -> Both:
    return continue_whole(runner_of(llama()), runner_of(worse_llama()), task_of(TWICE))


def close(found: Both, expected: Both) -> bool:
    """Whether all tokens are equal, and the margins up to rounding."""

    def tokens(both: Both) -> list[Any]:
        models = (both.reference, both.artifact)
        return [[each.tokens for each in texts] for model in models for texts in (model.greedy, *model.samples)]

    pairs = zip(found.reference.greedy, expected.reference.greedy, strict=True)
    assert all(own.margins == pytest.approx(other.margins, abs=1e-4) for own, other in pairs)
    return tokens(found) == tokens(expected) and list(map(tuple, found.tops)) == list(map(tuple, expected.tops))


def test_both_models_samples_and_opinions_are_those_of_whole_models() -> None:
    reference, artifact, drafter = runner_of(llama()), runner_of(worse_llama()), runner_of(worse_llama())
    drafted = continue_by_blocks(reference, artifact, drafter.whole, task_of(TWICE))
    guessed = continue_by_blocks(reference, artifact, None, task_of(TWICE))
    assert close(drafted, whole_texts())
    assert close(guessed, whole_texts())
    assert drafted.passes is not None
    assert guessed.passes is not None
    assert (drafted.passes.drafted, guessed.passes.drafted) == (True, False)
    assert drafted.passes.reference < guessed.passes.reference <= LIMIT
    assert drafted.passes.artifact is not None
    assert drafted.passes.artifact <= 3, "along the reference's text, along its own, and what rounding changes"


def test_a_graph_runs_as_a_whole_once_the_reference_has_ended() -> None:
    graph = Graph(runner_of(worse_llama()))
    found = continue_by_blocks(runner_of(llama()), graph, graph.whole, task_of(TWICE))
    assert close(found, whole_texts())
    assert graph.opened == 2
    assert found.passes is not None
    assert found.passes.artifact is None


def test_equal_models_give_equal_texts() -> None:
    runners = [runner_of(llama(), torch.bfloat16) for _ in range(2)]
    found = continue_by_blocks(runners[0], runners[1], None, task_of(TWICE))
    assert found.reference == found.artifact
    assert [tuple(top) for top in found.tops] == [each.tokens for each in found.reference.greedy]
    assert found.passes is not None
    assert found.passes.artifact == 1


def test_every_block_of_every_pass_is_told() -> None:
    events: list[Progress] = []
    steps = Steps(lambda event: events.append(event) if isinstance(event, Progress) else None)
    runners = [runner_of(llama()), runner_of(worse_llama())]
    passes = continue_by_blocks(runners[0], runners[1], None, task_of(steps=steps)).passes
    assert passes is not None
    assert passes.artifact is not None
    assert steps.done == steps.total == 2 * (passes.reference + passes.artifact)
    assert events[-1].detail == f"prompts through the artifact, pass {passes.artifact}, block 2 of 2"
