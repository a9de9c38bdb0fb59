"""Continuations of prompts by both models, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN
from qexport.text.prompts import Prompt
from qexport.verifying.continuation import Continuation, continue_all, ends_of, likeliest_along, sampling_noise
from qexport.verifying.prompt_batches import Padding, PromptBatch, batch_prompts, check_padding
from qexport.verifying.settings import SamplingSettings
from qexport.verifying.text_similarity import chrf, edit_distance, first_difference, repetition_rate, rouge_l


class Openable(Protocol):
    """A model that can be held in memory as a whole."""

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with all its weights, which are released at the end; its logits are float32, or the graph's."""
        ...


@dataclass(frozen=True)
class PromptResult:
    """The greedy continuations of one prompt by both models.

    Attributes:
        id: the prompt's.
        reference: the reference's text, without special tokens.
        artifact: the artifact's.
        reference_tokens: new tokens, an end token counted; at least 1.
        artifact_tokens: the same of the artifact.
        first_difference: index of the first new token that differs; None where all are equal.
        margin_there: nats that the reference's token was ahead of its second likeliest there; None where all are equal.
        flips: tokens of the reference that were ahead by more than `DECISIVE_MARGIN` and in whose place the artifact
            holds another for the likeliest, given the prompt and the reference's tokens before it.
        edit_distance: see `text_similarity.edit_distance`; of the tokens.
        chrf: see `text_similarity.chrf`, 0 to 100.
        rouge_l: see `text_similarity.rouge_l`, 0 to 1.
        repetition_reference: see `text_similarity.repetition_rate`; of the reference's tokens.
        repetition_artifact: the same of the artifact.
        limit_reference: the reference had not ended when it reached the largest number of new tokens.
        limit_artifact: the same of the artifact.
    """

    id: str
    reference: str
    artifact: str
    reference_tokens: int
    artifact_tokens: int
    first_difference: int | None
    margin_there: float | None
    flips: int
    edit_distance: float
    chrf: float
    rouge_l: float
    repetition_reference: float
    repetition_artifact: float
    limit_reference: bool
    limit_artifact: bool

    @property
    def identical(self) -> bool:
        """Whether all tokens are equal."""
        return self.first_difference is None

    @property
    def agreed_share(self) -> float:
        """Share of the reference's tokens before the first difference, 0 to 1; 1 where all tokens are equal."""
        return 1.0 if self.first_difference is None else self.first_difference / self.reference_tokens

    @property
    def length_ratio(self) -> float:
        """The artifact's tokens over the reference's."""
        return self.artifact_tokens / self.reference_tokens


@dataclass(frozen=True)
class SampleResult:
    """A sampled continuation of one prompt by both models, drawn with the same random numbers.

    Attributes:
        id: the prompt's.
        sample: which of its samples, from 0.
        reference: the reference's text, without special tokens.
        artifact: the artifact's.
        chrf: as in `PromptResult`.
    """

    id: str
    sample: int
    reference: str
    artifact: str
    chrf: float


@dataclass(frozen=True)
class GenerationFigures:
    """What both models make of the prompts.

    Attributes:
        prompts: one result a prompt, in the order of the prompts.
        samples: sample by sample, each in the order of the prompts; empty where none were asked for.
        max_new_tokens: the limit of every continuation.
        padding: whether prompts of different lengths were continued side by side, and what that changes.
    """

    prompts: tuple[PromptResult, ...]
    samples: tuple[SampleResult, ...]
    max_new_tokens: int
    padding: Padding


def compare_generations(
    reference: Openable,
    artifact: Openable,
    prompts: Sequence[Prompt],
    inputs: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    finished: Callable[[], None],
    sampling: SamplingSettings | None = None,
) -> GenerationFigures:
    """Lets one model after the other continue every prompt. Each is wholly in memory meanwhile, never both.

    Both continue the same batches, so equal models give equal texts. Compared with continuing the prompts one by one,
    batches round in another order, which can decide between tokens that are nearly equally likely.

    Args:
        reference: the merged model.
        artifact: the artifact.
        prompts: what to continue; only their ids are used.
        inputs: their token ids, at least one for each prompt.
        tokenizer: the model's.
        settings: from `greedy_settings`.
        finished: is told of each continuation: twice for each prompt, and twice for each of its samples.
        sampling: the recipe's `verify.sampling`.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    ids = [prompt.id for prompt in prompts]
    batch = partial(batch_prompts, inputs, new_tokens=_limit(settings), fill=_fill(settings))
    with reference.whole() as model:
        padding = check_padding(model, batch(padded=True), settings)
        batches = batch(padded=padding.allowed)
        own = continue_all(model, batches, settings, finished)
        own_samples = _samples(model, batches, ids, settings, sampling, finished)
    with artifact.whole() as model:
        other = continue_all(model, batches, settings, finished)
        tops = likeliest_along(model, batches, own)
        other_samples = _samples(model, batches, ids, settings, sampling, finished)
    results = (
        _compare(name, ours, theirs, top, tokenizer, settings)
        for name, ours, theirs, top in zip(ids, own, other, tops, strict=True)
    )
    samples = (
        _compare_samples(name, sample, ours, theirs, tokenizer)
        for sample, both in enumerate(zip(own_samples, other_samples, strict=True))
        for name, ours, theirs in zip(ids, *both, strict=True)
    )
    return GenerationFigures(tuple(results), tuple(samples), _limit(settings), padding)


def _samples(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    ids: Sequence[str],
    settings: GenerationConfig,
    sampling: SamplingSettings | None,
    finished: Callable[[], None],
) -> list[list[Continuation]]:
    """For each sample the continuations of all prompts."""
    if sampling is None:
        return []

    def noise(sample: int, indices: Sequence[int]) -> LogitsProcessorList:
        return sampling_noise(sampling, [ids[index] for index in indices], sample)

    return [
        continue_all(model, batches, settings, finished, partial(noise, sample)) for sample in range(sampling.samples)
    ]


def _compare(
    name: str,
    own: Continuation,
    other: Continuation,
    top: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
) -> PromptResult:
    texts = _decode(tokenizer, own.tokens), _decode(tokenizer, other.tokens)
    difference = first_difference(own.tokens, other.tokens)
    along = zip(own.tokens, top, own.margins, strict=True)
    return PromptResult(
        id=name,
        reference=texts[0],
        artifact=texts[1],
        reference_tokens=len(own.tokens),
        artifact_tokens=len(other.tokens),
        first_difference=difference,
        margin_there=None if difference is None else own.margins[difference],
        flips=sum(token != likeliest and margin > DECISIVE_MARGIN for token, likeliest, margin in along),
        edit_distance=edit_distance(own.tokens, other.tokens),
        chrf=chrf(*texts),
        rouge_l=rouge_l(*texts),
        repetition_reference=repetition_rate(own.tokens),
        repetition_artifact=repetition_rate(other.tokens),
        limit_reference=own.tokens[-1] not in ends_of(settings),
        limit_artifact=other.tokens[-1] not in ends_of(settings),
    )


def _compare_samples(
    name: str, sample: int, own: Continuation, other: Continuation, tokenizer: PreTrainedTokenizerBase
) -> SampleResult:
    texts = _decode(tokenizer, own.tokens), _decode(tokenizer, other.tokens)
    return SampleResult(name, sample, *texts, chrf(*texts))


def style_sensitivity(values: Mapping[str, float], prompts: Sequence[Prompt]) -> dict[str, float]:
    """For each pair of prompts the value of the messy one minus that of the clean one, by the pair's name.

    Args:
        values: a figure by the prompt's id, for example `edit_distance`.
        prompts: those without a pair, and pairs of which a half has no value, are passed over.
    """
    halves: dict[str, dict[str, float]] = {}
    for prompt in prompts:
        if prompt.pair is not None and prompt.id in values:
            halves.setdefault(prompt.pair, {})[prompt.style] = values[prompt.id]
    return {
        pair: found["messy"] - found["clean"] for pair, found in halves.items() if {"messy", "clean"} <= found.keys()
    }


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _limit(settings: GenerationConfig) -> int:
    assert isinstance(settings.max_new_tokens, int)
    return settings.max_new_tokens


def _fill(settings: GenerationConfig) -> int:
    assert isinstance(settings.pad_token_id, int)
    return settings.pad_token_id
