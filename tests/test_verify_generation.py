"""Continuations in batches against transformers on models that it loaded itself, one prompt at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

import factories
from qexport.architectures.architecture import Architecture
from qexport.architectures.machine_memory import available_memory
from qexport.architectures.runner import BlockRunner
from qexport.artifact.measurements import Generations
from qexport.errors import NumericalError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.progress import Steps, silent
from qexport.text.prompts import EncodedPrompts, Prompt, PromptSet, Style
from qexport.verifying import SamplingSettings
from qexport.verifying.continuation import Continuation, continue_all, greedy_settings, likeliest_along
from qexport.verifying.continuing import Both, Task, continue_whole
from qexport.verifying.generation import compare_texts, style_sensitivity
from qexport.verifying.memory import needed_memory
from qexport.verifying.prompt_batches import PromptBatch, batch_prompts, check_padding
from qexport.verifying.whole_models import padding_notes
from quantized_models import QuantizedModel, Tensors
from test_text_similarity import distance_by_table

CPU = torch.device("cpu")
TOKENIZER = factories.tokenizer()
CONFIGS = [factories.llama_config(), factories.qwen2_config(), factories.mistral_config(), factories.falcon_config()]
LENGTHS = (3, 17, 5, 40, 1, 17)
NEW_TOKENS = 10
NOISE = 0.15
"""Nats: what rounding to bfloat16 moves in these models, far below a decision."""


def inputs_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, factories.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def batches_of(inputs: Sequence[Sequence[int]], *, padded: bool = True) -> list[PromptBatch]:
    return batch_prompts(inputs, new_tokens=NEW_TOKENS, padded=padded, fill=0)


def nothing() -> None:
    pass


def runner_of(model: QuantizedModel, dtype: torch.dtype = torch.float32) -> BlockRunner:
    return BlockRunner(model.checkpoint.architecture, model.checkpoint.weights, dtype=dtype, device=CPU)


def changed_runner(model: QuantizedModel, **changes: torch.Tensor) -> BlockRunner:
    tensors = dict(model.model.state_dict()) | {name.replace("__", "."): value for name, value in changes.items()}
    return BlockRunner(model.checkpoint.architecture, Tensors(tensors), dtype=torch.float32, device=CPU)


def continued(
    runner: BlockRunner, inputs: Sequence[Sequence[int]], settings: GenerationConfig, **options: Any
) -> list[Continuation]:
    with runner.whole() as model:
        return continue_all(model, batches_of(inputs, **options), settings, nothing)


def tokens_of(continuations: Sequence[Continuation]) -> list[list[int]]:
    return [list(continuation.tokens) for continuation in continuations]


@pytest.fixture(scope="module", params=factories.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family")
    return factories.save(factories.build(factories.FAMILIES[request.param], dtype=torch.float32), path)


def load_runner(folder: Path, dtype: torch.dtype) -> BlockRunner:
    checkpoint = load_checkpoint(LoadSettings(base=str(folder)))
    return BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=dtype, device=CPU)


GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=[0], pad_token_id=0)


@torch.no_grad()
def test_batches_give_the_tokens_margins_and_opinions_of_one_prompt_at_a_time(folder: Path) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = inputs_of()
    with load_runner(folder, torch.float32).whole() as model:
        batches = batches_of(inputs)
        padding = check_padding(model, batches, GREEDY)
        found = continue_all(model, batches, GREEDY, nothing)
        along = [replace(each, tokens=each.tokens[: 3 + place]) for place, each in enumerate(reversed(found))]
        tops = likeliest_along(model, batches, along)
    assert max(batch.padded for batch in batches) == 39
    assert padding.allowed
    assert padding.kl == pytest.approx(0, abs=1e-6)
    for ids, ours, given, top in zip(inputs, found, along, tops, strict=True):
        alone = theirs.generate(
            torch.tensor([ids]), generation_config=GREEDY, output_logits=True, return_dict_in_generate=True
        )
        assert list(ours.tokens) == alone.sequences[0, len(ids) :].tolist()
        likely = torch.cat(alone.logits).log_softmax(-1).topk(2).values
        assert ours.margins == pytest.approx((likely[:, 0] - likely[:, 1]).tolist(), abs=1e-4)
        logits = theirs(torch.tensor([[*ids, *given.tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert list(top) == logits.argmax(-1).tolist()


def test_in_bfloat16_only_near_ties_fall_otherwise_in_batches(folder: Path) -> None:
    runner, inputs = load_runner(folder, torch.bfloat16), inputs_of()
    together = continued(runner, inputs, GREEDY)
    for ids, beside in zip(inputs, together, strict=True):
        alone = continued(runner, [ids], GREEDY)[0]
        pairs = zip(alone.tokens, beside.tokens, alone.margins, strict=True)
        margins = [margin for own, other, margin in pairs if own != other]
        assert margins[:1] == pytest.approx([0], abs=NOISE) or not margins


@cache
def llama() -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()))


def by_hand(folder: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest token of a fresh forward over everything so far, again and again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.model_type))
def test_continuations_are_the_likeliest_tokens_one_by_one(config: PretrainedConfig, tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(config))
    factories.save(model.model, tmp_path / "model")
    inputs = [TOKENIZER(text)["input_ids"] for text in ("The miller", "Total: 12 boxes")]
    settings = greedy_settings(model.checkpoint, TOKENIZER, max_new_tokens=6)
    found = continued(runner_of(model), inputs, settings)
    assert tokens_of(found) == [by_hand(tmp_path / "model", ids, 6) for ids in inputs]


def test_a_continuation_ends_with_any_end_token_that_the_models_files_name() -> None:
    ids = TOKENIZER(factories.TEXT[0])["input_ids"]
    settings = greedy_settings(llama().checkpoint, TOKENIZER, max_new_tokens=8)
    assert settings.eos_token_id == [0]
    third = continued(runner_of(llama()), [ids], settings)[0].tokens[2]
    files = {"generation_config.json": json.dumps({"eos_token_id": [third, 380]}).encode()}
    ending = greedy_settings(replace(llama().checkpoint, files=files), TOKENIZER, max_new_tokens=8)
    assert ending.eos_token_id == sorted({0, third, 380})
    found = continued(runner_of(llama()), [ids, *inputs_of()], ending)
    assert found[0].tokens[-1] == third
    assert len(found[0].tokens) == len(found[0].margins) <= 3
    assert max(len(each.tokens) for each in found) == 8


def test_sampling_and_penalties_of_the_models_own_config_do_not_enter() -> None:
    ours = dict(llama().checkpoint.config)
    files = {"generation_config.json": b'{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0}'}
    inputs = [TOKENIZER(factories.TEXT[0])["input_ids"]]
    plain, changed = (
        continued(
            BlockRunner(Architecture(config), llama().checkpoint.weights, dtype=torch.float32, device=CPU),
            inputs,
            greedy_settings(replace(llama().checkpoint, files=given), TOKENIZER, max_new_tokens=12),
        )
        for config, given in ((ours, {}), (ours | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2}, files))
    )
    assert plain == changed


def test_logits_that_are_no_numbers_are_an_error() -> None:
    broken = changed_runner(llama(), model__norm__weight=torch.full((64,), torch.nan))
    with pytest.raises(NumericalError, match="NaN"):
        continued(broken, inputs_of(), GREEDY)


def test_batches_hold_every_prompt_once_and_keep_their_limits() -> None:
    lengths = [*range(1, 90), 2000, 3000, 5000]
    for padded in (True, False):
        batches = batch_prompts(inputs_of(lengths * 2), new_tokens=32, padded=padded, fill=7)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(2 * len(lengths)))
        for batch in batches:
            rows, width = batch.input_ids.shape
            assert rows == 1 or (rows <= 32 and rows * (width + 32) <= 4096)
            assert padded or batch.padded == 0
            assert (batch.input_ids[batch.attention_mask == 0] == 7).all()
            assert batch.attention_mask[:, -1].all()
            assert (batch.attention_mask.diff(dim=1) >= 0).all()


class Unmasked(BlockRunner):
    """A family that does not heed the mask, always or only behind the prompt: padding enters its arithmetic."""

    only_behind = False

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        with super().whole() as model:
            usual = model.forward

            @functools.wraps(usual)
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.only_behind and kwargs["input_ids"].shape[1] > 1:
                    return usual(*args, **kwargs)
                return usual(*args, **(kwargs | {"attention_mask": None, "position_ids": None}))

            model.forward = forward
            try:
                yield model
            finally:
                del model.forward


def unmasked(only_behind: bool) -> Unmasked:
    runner = Unmasked(llama().checkpoint.architecture, llama().checkpoint.weights, dtype=torch.float32, device=CPU)
    runner.only_behind = only_behind
    return runner


def encoded(names: Sequence[str], inputs: Sequence[list[int]]) -> EncodedPrompts:
    prompts = tuple(Prompt(name, "") for name in names)
    return EncodedPrompts(PromptSet(prompts, "prompts.jsonl"), prompts, tuple(inputs), {})


@dataclass(frozen=True)
class Compared:
    both: Both
    generations: Generations


def compare(
    reference: BlockRunner, artifact: BlockRunner, sampling: SamplingSettings | None = None, count: int = len(LENGTHS)
) -> Compared:
    prompts = encoded([f"p{index}" for index in range(count)], inputs_of()[:count])
    both = continue_whole(reference, artifact, Task(prompts, GREEDY, sampling, Steps(silent)))
    return Compared(both, compare_texts(both, prompts, TOKENIZER, GREEDY, sampling.seed if sampling else 0))


@pytest.mark.parametrize("only_behind", [True, False])
def test_left_padding_without_a_mask_is_noticed_and_only_equal_lengths_share_a_batch(only_behind: bool) -> None:
    inputs = inputs_of()
    alone = [continued(runner_of(llama()), [ids], GREEDY)[0].tokens for ids in inputs]
    beside = [each.tokens for each in continued(unmasked(only_behind), inputs, GREEDY)]
    assert [own == other for own, other in zip(alone, beside, strict=True)].count(True) <= 1
    apart = [each.tokens for each in continued(unmasked(only_behind), inputs, GREEDY, padded=False)]
    assert apart == alone
    found = compare(unmasked(only_behind), unmasked(only_behind))
    assert not found.both.padding.allowed
    assert found.both.padding.kl is not None
    assert found.both.padding.kl > 0.01
    (note,) = padding_notes(found.both.padding)
    assert note.startswith("only prompts of equal length were continued side by side")
    assert [each.reference for each in found.generations.comparisons] == [
        TOKENIZER.decode(list(tokens), skip_special_tokens=True) for tokens in alone
    ]


def test_equal_lengths_need_no_trial() -> None:
    with runner_of(llama()).whole() as model:
        padding = check_padding(model, batches_of(inputs_of([4, 4, 4])), GREEDY)
    assert (padding.allowed, padding.kl) == (True, None)


def test_equal_models_differ_nowhere() -> None:
    found = compare(runner_of(llama()), runner_of(llama()), SamplingSettings())
    assert found.generations.max_new_tokens == NEW_TOKENS
    for each in found.generations.comparisons:
        assert each.identical
        assert each.reference == each.artifact
        assert (each.agreed_share, each.length_ratio, each.chrf, each.rouge_l) == (1, 1, 100, 1)
        assert (each.flips, each.edit_distance, each.margin) == (0, 0, None)
        assert each.reference_repetition == each.artifact_repetition
        assert each.reference_hit_limit == each.artifact_hit_limit
    assert all(each.reference == each.artifact for each in found.generations.samples)


@torch.no_grad()
def test_the_figures_of_a_prompt_are_those_of_its_two_continuations(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    head = llama().model.state_dict()["lm_head.weight"]
    other = head + 0.05 * torch.randn(head.shape, generator=generator).to(head.dtype)
    settings, inputs = GREEDY, inputs_of()
    ours = continued(runner_of(llama()), inputs, settings)
    theirs = continued(changed_runner(llama(), lm_head__weight=other), inputs, settings)
    found = compare(runner_of(llama()), changed_runner(llama(), lm_head__weight=other)).generations.comparisons
    artifact = AutoModelForCausalLM.from_pretrained(factories.save(llama().model, tmp_path), dtype=torch.float32)
    artifact.lm_head.weight.copy_(other)
    for ids, own, changed, figures in zip(inputs, ours, theirs, found, strict=True):
        assert (figures.reference_tokens, figures.artifact_tokens) == (len(own.tokens), len(changed.tokens))
        texts = [str(TOKENIZER.decode(list(each.tokens), skip_special_tokens=True)) for each in (own, changed)]
        assert [figures.reference, figures.artifact] == texts
        assert figures.chrf == sacrebleu.sentence_chrf(texts[1], [texts[0]]).score
        longer = max(len(own.tokens), len(changed.tokens))
        assert figures.edit_distance == distance_by_table(list(own.tokens), list(changed.tokens)) / longer
        logits = artifact(torch.tensor([[*ids, *own.tokens]])).logits[0, len(ids) - 1 : -1]
        decided = [margin > 0.5 for margin in own.margins]
        top = logits.argmax(-1).tolist()
        assert figures.flips == sum(
            decision and token != likeliest for decision, token, likeliest in zip(decided, own.tokens, top, strict=True)
        )
        assert figures.reference_hit_limit == (own.tokens[-1] != 0)
        if figures.first_difference is not None:
            assert figures.margin == own.margins[figures.first_difference]
            assert figures.agreed_share == figures.first_difference / len(own.tokens)
    assert {True, False} >= {each.identical for each in found}
    assert 0 < sum(each.flips for each in found) < sum(each.reference_tokens for each in found)


def test_each_prompt_and_sample_of_both_models_is_told() -> None:
    prompts, steps = encoded(["a", "b"], inputs_of([3, 4])), Steps(silent)
    task = Task(prompts, GREEDY, SamplingSettings(samples=2), steps)
    continue_whole(runner_of(llama()), runner_of(llama()), task)
    assert steps.done == steps.total == 2 * 2 * 3


def test_a_seed_gives_the_same_samples_again_and_other_prompts_have_no_say() -> None:
    def samples(settings: SamplingSettings, count: int = len(LENGTHS)) -> dict[tuple[str, int], str]:
        found = compare(runner_of(llama()), runner_of(llama()), settings, count).generations.samples
        return {(each.id, each.sample): each.artifact for each in found}

    twice = SamplingSettings(seed=3, samples=2)
    first = samples(twice)
    assert first == samples(twice)
    assert len(first) == 2 * len(LENGTHS)
    assert all(first["p1", 0] != first[name, 1] for name in ("p1", "p5"))
    assert samples(twice, 3).items() <= first.items()
    other = samples(SamplingSettings(seed=4, samples=2))
    assert sum(first[key] == other[key] for key in first) == 0


def test_samples_of_different_models_are_compared() -> None:
    head = llama().model.state_dict()["lm_head.weight"]
    other = changed_runner(llama(), lm_head__weight=head.roll(1, 0))
    for each in compare(runner_of(llama()), other, SamplingSettings()).generations.samples:
        assert each.reference != each.artifact
        assert each.chrf == sacrebleu.sentence_chrf(each.artifact, [each.reference]).score


def styled(name: str, style: Style, pair: str | None) -> Prompt:
    return Prompt(name, "", style=style, pair=pair)


def test_the_sensitivity_to_style_is_messy_minus_clean_of_each_pair() -> None:
    prompts = [
        styled("a", "clean", "x"), styled("b", "messy", "x"), styled("c", "messy", "y"), styled("d", "clean", "y"),
        styled("e", "messy", None), styled("f", "clean", None), styled("g", "clean", "z"), styled("h", "messy", "z"),
    ]  # fmt: skip
    values = {"a": 0.25, "b": 1.0, "c": 0.5, "d": 0.75, "e": 9.0, "f": 9.0, "g": 1.0}
    assert style_sensitivity(values, prompts) == {"x": 0.75, "y": -0.25}


@pytest.mark.parametrize("tied", [True, False])
def test_the_memory_of_a_whole_model_is_estimated_from_its_shapes(tied: bool) -> None:
    model = QuantizedModel(factories.build(factories.llama_config(tie_word_embeddings=tied)))
    parameters, head = sum(p.numel() for p in model.model.parameters()), factories.VOCABULARY * 64
    assert needed_memory(runner_of(model, torch.bfloat16)) == int((2 * parameters + 4 * head) * 1.25)


def test_the_memory_available_is_that_of_the_system_or_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr("qexport.architectures.machine_memory._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("qexport.architectures.machine_memory._CGROUP", tmp_path)
    assert available_memory(CPU) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) == 4000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert available_memory(CPU) == 800000
