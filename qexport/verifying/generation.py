"""How much the continuations of both models differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Final

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qexport.artifact.figures import DECISIVE_MARGIN
from qexport.artifact.measurements import Generations, PromptComparison, SampledComparison
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying.continuation import Continuation, ends_of
from qexport.verifying.continuing import Both

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


def compare_texts(
    both: Both,
    prompts: EncodedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    seed: int,
) -> Generations:
    """Compares what both models made of each prompt.

    Args:
        both: their continuations.
        prompts: what was continued.
        tokenizer: the models'.
        settings: from `greedy_settings`.
        seed: of the samples.
    """
    pairs = zip(prompts.prompts, both.reference.greedy, both.artifact.greedy, both.tops, strict=True)
    comparisons = [_compare(prompt, own, other, top, tokenizer, settings) for prompt, own, other, top in pairs]
    samples = [
        _compare_samples(prompt.id, sample, seed, (own, other), tokenizer)
        for sample, found in enumerate(zip(both.reference.samples, both.artifact.samples, strict=True))
        for prompt, own, other in zip(prompts.prompts, *found, strict=True)
    ]
    assert isinstance(settings.max_new_tokens, int)
    return Generations(
        prompts=len(comparisons),
        identical=sum(each.identical for each in comparisons),
        max_new_tokens=settings.max_new_tokens,
        comparisons=comparisons,
        samples=samples,
        skipped=dict(prompts.skipped),
    )


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
