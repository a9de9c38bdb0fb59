"""An artifact as an endpoint computes it, from one log-probability a token.

On text that a model p has sampled, q/p - 1 - log(q/p) of each token is an unbiased estimate of KL(p || q), and never
negative. So two texts are sampled: from the reference for quality, from our float32 reading for fidelity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qexport.architectures.machine_memory import available_memory
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import CheckResult, Figure
from qexport.artifact.served import Scored
from qexport.errors import InputError
from qexport.progress import Steps
from qexport.reading.stored_model import StoredModel
from qexport.runtimes.endpoints import Endpoint, TokenScores
from qexport.statistics.means import PLANNED_UNITS, Array
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE
from qexport.verifying import SamplingSettings
from qexport.verifying.continuation import continue_all, ends_of, greedy_settings, sampling_noise
from qexport.verifying.divergence import TokenFigures, compare
from qexport.verifying.estimates import decisive_flips, relative_difference
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.memory import needed_memory
from qexport.verifying.predictors import predictors
from qexport.verifying.prompt_batches import batch_prompts
from qexport.verifying.reference import Reference
from qexport.verifying.served import NEW_TOKENS, judge_continuations, own_reading
from qexport.verifying.units import Units, document_units, measured_once

TEXTS: Final = 24
BEGINNING: Final = 16
SAMPLED: Final = 96
"""Texts, the tokens of held-out text that each begins with, and the tokens sampled after them."""

_CHECKED: Final = 4
"""Windows whose text the endpoint's tokenizer is given."""

_SAMPLING: Final = SamplingSettings(seed=0, temperature=1.0, top_p=1.0)


@dataclass(frozen=True)
class FromEndpoint:
    """What was measured.

    Attributes:
        figures: against the reference, and against our reading.
        scored: what the endpoint told.
        notes: how, and what could not be measured.
        checks: whether it makes the reference's tokens of a text; none if it does not tell.
    """

    figures: list[Figure]
    scored: Scored
    notes: list[str]
    checks: list[CheckResult]


def measure_endpoint(endpoint: Endpoint, artifact: StoredModel, reference: Reference, steps: Steps) -> FromEndpoint:
    """Measures on the windows of one look, and on sampled texts.

    Args:
        endpoint: serves the artifact.
        artifact: the same folder, in float32.
        reference: what to compare it with.
        steps: counts the steps.

    Raises:
        InputError: the endpoint fails, or its answers are none.
    """
    ours, merged = own_reading(artifact, reference.device), reference.runner(reference.merged)
    settings = greedy_settings(reference.merged, reference.tokenizer, max_new_tokens=NEW_TOKENS)
    ids = reference.held_out.input_ids[: reference.settings.windows]
    checks = _check_tokenizer(endpoint, reference, ids)
    steps.expect(1 + len(ids))
    figures = [judge_continuations(endpoint, ours, ids, ends_of(settings))]
    steps.finished(f"continuations through {endpoint.facts.name}")
    scores = [_scored(endpoint, row, steps) for row in ids.tolist()]
    told = [each for each in scores if each is not None]
    if not told:
        note = f"{endpoint.facts.name} does not score these prompts, so only continuations were compared"
        return FromEndpoint(figures, "nothing", [note], checks)
    known = [index for index, each in enumerate(scores) if each is not None]
    figures = [*_on_windows(told, ids[known], [merged, ours], reference, known), *figures]
    notes = ["mean_kl and fidelity_kl are estimates from one log-probability a token, on text sampled from each model"]
    if len(known) < len(ids):
        notes.append(f"{len(ids) - len(known)} windows were left out: the endpoint makes other tokens of their text")
    for name, model in (("mean_kl", merged), ("fidelity_kl", ours)):
        estimate, why = _estimate(name, endpoint, model, reference, steps)
        figures += [] if estimate is None else [estimate]
        notes += [] if why is None else [f"{name} was not measured: {why}"]
    return FromEndpoint(figures, "token", notes, checks)


def _check_tokenizer(endpoint: Endpoint, reference: Reference, ids: Tensor) -> list[CheckResult]:
    """Special tokens that a server puts around every text are not compared."""
    tokenizer = reference.tokenizer
    texts = [str(tokenizer.decode(row)) for row in ids[:_CHECKED].tolist()]
    special = set(tokenizer.all_special_ids)
    for text in texts:
        found, own = endpoint.tokenized(text), tokenizer.encode(text, add_special_tokens=False)
        if found is None:
            return []
        if [each for each in found if each not in special] != [each for each in own if each not in special]:
            detail = f"other tokens of {text[:40]!r}"
            return [CheckResult(gate="tokenizer", name="tokenizer of the endpoint", passed=False, detail=detail)]
    detail = f"the same tokens of {len(texts)} held-out texts"
    return [CheckResult(gate="tokenizer", name="tokenizer of the endpoint", passed=True, detail=detail)]


def _scored(endpoint: Endpoint, ids: Sequence[int], steps: Steps) -> TokenScores | None:
    found = endpoint.scores(ids)
    steps.finished(f"scores of {endpoint.facts.name}")
    if found is None:
        return None
    if len(found.log_probabilities) != len(ids) - 1 or not all(map(_is_logarithm, found.log_probabilities)):
        raise InputError(
            f"{endpoint.facts.name} gives no log-probability for each token of a text",
            where=endpoint.where,
            mend="check that the server has this model, and that nothing in it overflows: -inf or NaN is no answer",
        )
    return found


def _is_logarithm(value: float) -> bool:
    return math.isfinite(value) and value <= 1e-3


def _on_windows(
    scores: Sequence[TokenScores],
    ids: Tensor,
    runners: Sequence[BlockRunner],
    reference: Reference,
    kept: Sequence[int],
) -> list[Figure]:
    """Perplexities, the drift beside that of our reading, and what follows from the likeliest tokens, if the endpoint
    tells them.

    Divergences cannot be had on text that no model has sampled. Their place take squared differences of
    log-probabilities, which they are half of where differences are small.
    """
    states, _ = run_in_lockstep(runners, ids, lambda _: None, drift=False)
    with predictors(runners, states) as known:
        (ours,) = compare(known, [(0, 1)], ids, lambda _: None)
    nll = -torch.tensor([each.log_probabilities for each in scores], dtype=torch.float64)
    units = document_units(reference.held_out, max(kept) + 1, PLANNED_UNITS).chosen(kept)
    drifts = [units.means((each - ours.reference_nll).square()) for each in (nll, ours.artifact_nll)]
    figures = [
        units.mean("reference_perplexity", units.means(ours.reference_nll), NOT_NEGATIVE, function=math.exp),
        units.mean("artifact_perplexity", units.means(nll), NOT_NEGATIVE, function=math.exp),
        units.mean("perplexity_ratio", units.means(nll - ours.reference_nll), function=math.exp),
        measured_once(units.mean("kl_over_reading", relative_difference(*drifts), DIFFERENCE)),
    ]
    tops = [each.tops for each in scores if each.tops is not None]
    if len(tops) < len(scores):
        return figures
    served = TokenFigures(
        ours.reference_nll, nll, ours.kl, ours.margin, ours.reference_top, torch.tensor(tops, dtype=torch.int32)
    )
    return [
        *figures,
        units.mean("top1_agreement", units.means(~served.flipped), SHARE, trials=1),
        units.mean("decisive_flips", units.means(decisive_flips(served)), SHARE, trials=1),
        units.mean("fidelity_top1", units.means(served.artifact_top == ours.artifact_top), SHARE, trials=1),
    ]


def _estimate(
    name: str, endpoint: Endpoint, runner: BlockRunner, reference: Reference, steps: Steps
) -> tuple[Figure | None, str | None]:
    """The figure; or None, and why."""
    if needed_memory(runner) > available_memory(runner.device):
        return None, "the model does not fit in memory as a whole, so it can sample no text"
    steps.expect(2 * TEXTS)
    beginnings, new = _beginnings(reference.held_out.input_ids)
    settings, start = greedy_settings(reference.merged, reference.tokenizer, max_new_tokens=new), len(beginnings[0]) - 1
    with runner.whole() as model:
        texts = sample(model, beginnings, settings, partial(steps.finished, f"text for {name}"))
        own = [log_probabilities(model, text) for text in texts]
    values = []
    for text, known in zip(texts, own, strict=True):
        found = _scored(endpoint, text, steps)
        if found is not None:
            theirs = np.asarray(found.log_probabilities)
            values.append(float(kl_estimates(known[start:], theirs[start:]).mean()))
    if not values:
        return None, "the endpoint makes other tokens of the sampled texts"
    figure = Units([None] * len(values), "prompt", None, len(values)).mean(name, np.asarray(values), NOT_NEGATIVE)
    return measured_once(figure), None


def _beginnings(input_ids: Tensor) -> tuple[list[list[int]], int]:
    """The beginning of each text, and how many tokens to sample after it: no text is longer than a window."""
    length = input_ids.shape[1]
    rows = input_ids[:, : min(BEGINNING, length - 1)].tolist()
    return [rows[index % len(rows)] for index in range(TEXTS)], min(SAMPLED, length - len(rows[0]))


def sample(
    model: PreTrainedModel,
    beginnings: Sequence[Sequence[int]],
    settings: GenerationConfig,
    finished: Callable[[], None],
) -> list[list[int]]:
    """Each beginning with what the model samples after it, from its whole distribution: T = 1, no top-p, no top-k.

    Args:
        model: with all its weights.
        beginnings: token ids, all of one length.
        settings: from `greedy_settings`.
        finished: is called after each text.
    """
    names = [f"sampled-{index}" for index in range(len(beginnings))]

    def noise(indices: Sequence[int]) -> object:
        return sampling_noise(_SAMPLING, [names[index] for index in indices], 0)

    fill = settings.pad_token_id
    assert isinstance(fill, int)
    batches = batch_prompts(beginnings, new_tokens=SAMPLED, padded=False, fill=fill)
    found = continue_all(model, batches, settings, finished, noise)  # type: ignore[arg-type]
    return [[*begin, *new.tokens] for begin, new in zip(beginnings, found, strict=True)]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> Array:
    """Of each token but the first, float64."""
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    chosen = logits.log_softmax(-1, dtype=torch.float64).gather(1, row[0, 1:, None])[:, 0]
    return np.asarray(chosen.cpu().numpy())


def kl_estimates(own: Array, served: Array) -> Array:
    """For each token that p has sampled: q/p - 1 - log(q/p), whose expectation is KL(p || q).

    Args:
        own: log p of each token.
        served: log q of it.
    """
    difference = served - own
    return np.expm1(difference) - difference
