"""Continuations of prompts by both models, and how much they differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, Final, Protocol

import numpy as np
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN
from qexport.artifact.measurements import Generations, PromptComparison, SampledComparison
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying import SamplingSettings
from qexport.verifying.continuation import Continuation, continue_all, ends_of, likeliest_along, sampling_noise
from qexport.verifying.prompt_batches import Padding, PromptBatch, batch_prompts, check_padding

_GRAM: Final = 4

_UNSPACED: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, further extensions
)
"""Scripts that put no spaces between words."""


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, or one of them has ended; None if they are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    return next((index for index, (own, other) in pairs if own != other), shorter)


def edit_distance(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Insertions, deletions and substitutions of tokens (Levenshtein), over the longer length: 0 to 1.

    0 if both are empty. Row by row as in Wagner and Fischer (1974); within a row, insertions are a running minimum.
    """
    longer = max(len(ours), len(theirs))
    if not longer:
        return 0.0
    columns, target = np.arange(len(theirs) + 1), np.asarray(theirs, dtype=np.int64)
    row = columns.copy()
    for count, token in enumerate(ours, start=1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (target != token))])
        row = np.minimum.accumulate(best - columns) + columns
    return float(row[-1]) / longer


def repetition_rate(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before, 0 to 1; 0 for fewer than five tokens."""
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def chrf(reference: str, text: str) -> float:
    """chrF2 in percent, 0 to 100: F-score (beta 2) of character n-grams up to 6, without white space (Popović 2015).

    As sacrebleu computes it for one sentence. If neither text has a character other than white space, 100; if only one
    has, 0.
    """
    if not reference.split() and not text.split():
        return 100.0
    return float(_chrf().sentence_score(text, [reference]).score)


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L, 0 to 1: F-score (beta 1) of the longest common subsequence of words (Lin 2004), without stemming.

    As rouge-score computes it, but with our own split into words: its tokenizer is made for English and drops every
    letter outside a to z. See `words`. If neither text has a word, 1 if they are equal and 0 if not.
    """
    if not words(reference) and not words(text):
        return float(reference == text)
    return float(_rouge().score(reference, text)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks in lower case; for scripts without spaces, every character.

    For English text the same as rouge-score's own tokenizer.
    """
    normal = unicodedata.normalize("NFC", text).lower()
    found: list[str] = []
    for kind, run in groupby(normal, key=_kind):
        if kind == "word":
            found.append("".join(run))
        elif kind == "character":
            found.extend(run)
    return found


def _kind(character: str) -> str:
    if unicodedata.category(character)[0] not in "LNM":
        return "between"
    return "character" if any(low <= ord(character) <= high for low, high in _UNSPACED) else "word"


class _Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class Openable(Protocol):
    """A model that can be loaded into memory as a whole."""

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with all its weights, which are released at the end; its logits are float32, or the graph's."""
        ...


@dataclass(frozen=True)
class ComparedPrompts:
    """The prompts, continued by both models.

    Attributes:
        generations: for the report.
        padding: whether prompts of different lengths shared batches, and how much padding changes the predictions.
    """

    generations: Generations
    padding: Padding


def compare_generations(
    reference: Openable,
    artifact: Openable,
    prompts: EncodedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    finished: Callable[[], None],
    sampling: SamplingSettings | None = None,
) -> ComparedPrompts:
    """Continues every prompt with one model, then with the other. Only one of them is in memory at a time.

    Both continue the same batches, so equal models give equal texts. Compared with continuing the prompts one by one,
    batches sum in another order, and the rounding can decide between tokens that are nearly equally likely.

    Args:
        reference: the merged model.
        artifact: the artifact.
        prompts: what to continue.
        tokenizer: the model's.
        settings: from `greedy_settings`.
        finished: is called after each continuation: twice for each prompt, and twice for each of its samples.
        sampling: the recipe's `verify.sampling`.
    """
    ids = [prompt.id for prompt in prompts.prompts]
    batch = partial(batch_prompts, prompts.input_ids, new_tokens=_limit(settings), fill=_fill(settings))
    with reference.whole() as model:
        padding = check_padding(model, batch(padded=True), settings)
        batches = batch(padded=padding.allowed)
        own = continue_all(model, batches, settings, finished)
        own_samples = _samples(model, batches, ids, settings, sampling, finished)
    with artifact.whole() as model:
        other = continue_all(model, batches, settings, finished)
        tops = likeliest_along(model, batches, own)
        other_samples = _samples(model, batches, ids, settings, sampling, finished)
    comparisons = [
        _compare(prompt, ours, theirs, top, tokenizer, settings)
        for prompt, ours, theirs, top in zip(prompts.prompts, own, other, tops, strict=True)
    ]
    seed = sampling.seed if sampling else 0
    samples = [
        _compare_samples(name, sample, seed, (ours, theirs), tokenizer)
        for sample, both in enumerate(zip(own_samples, other_samples, strict=True))
        for name, ours, theirs in zip(ids, *both, strict=True)
    ]
    generations = Generations(
        prompts=len(comparisons),
        identical=sum(each.identical for each in comparisons),
        max_new_tokens=_limit(settings),
        comparisons=comparisons,
        samples=samples,
        skipped=dict(prompts.skipped),
    )
    return ComparedPrompts(generations, padding)


def _samples(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    ids: Sequence[str],
    settings: GenerationConfig,
    sampling: SamplingSettings | None,
    finished: Callable[[], None],
) -> list[list[Continuation]]:
    """For each sample, the continuations of all prompts."""
    if sampling is None:
        return []

    def noise(sample: int, indices: Sequence[int]) -> LogitsProcessorList:
        return sampling_noise(sampling, [ids[index] for index in indices], sample)

    return [
        continue_all(model, batches, settings, finished, partial(noise, sample)) for sample in range(sampling.samples)
    ]


def _compare(
    prompt: Prompt,
    own: Continuation,
    other: Continuation,
    top: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
) -> PromptComparison:
    texts = _decode(tokenizer, own.tokens), _decode(tokenizer, other.tokens)
    difference = first_difference(own.tokens, other.tokens)
    along = zip(own.tokens, top, own.margins, strict=True)
    return PromptComparison(
        id=prompt.id,
        domain=prompt.domain,
        style=prompt.style,
        pair=prompt.pair,
        prompt=prompt.shown,
        reference=texts[0],
        artifact=texts[1],
        reference_tokens=len(own.tokens),
        artifact_tokens=len(other.tokens),
        first_difference=difference,
        margin=None if difference is None else own.margins[difference],
        flips=sum(token != likeliest and margin > DECISIVE_MARGIN for token, likeliest, margin in along),
        edit_distance=edit_distance(own.tokens, other.tokens),
        chrf=chrf(*texts),
        rouge_l=rouge_l(*texts),
        reference_repetition=repetition_rate(own.tokens),
        artifact_repetition=repetition_rate(other.tokens),
        reference_hit_limit=own.tokens[-1] not in ends_of(settings),
        artifact_hit_limit=other.tokens[-1] not in ends_of(settings),
    )


def _compare_samples(
    name: str, sample: int, seed: int, both: tuple[Continuation, Continuation], tokenizer: PreTrainedTokenizerBase
) -> SampledComparison:
    reference, artifact = (_decode(tokenizer, each.tokens) for each in both)
    return SampledComparison(
        id=name, sample=sample, seed=seed, reference=reference, artifact=artifact, chrf=chrf(reference, artifact)
    )


def style_sensitivity(values: Mapping[str, float], prompts: Sequence[Prompt]) -> dict[str, float]:
    """For each pair of prompts, the value of the messy one minus that of the clean one, by the pair's name.

    Args:
        values: a figure by the prompt's id, for example `edit_distance`.
        prompts: those without a pair are skipped, and so are pairs in which one prompt has no value.
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
