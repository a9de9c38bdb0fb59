"""Measurements that need whole models in memory: prompts, tasks, speed. Skipped with a note if they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.amounts import size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import Generations, PromptComparison, TaskRecord
from qexport.progress import Notice, ProgressCallback, Steps
from qexport.reading.stored_model import StoredModel
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE, Range
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying import SpeedSettings, TaskSettings, VerifySettings
from qexport.verifying.continuation import greedy_settings
from qexport.verifying.estimates import Units, by_domain
from qexport.verifying.generation import Openable, compare_generations, style_sensitivity
from qexport.verifying.memory import available_memory, needed_memory
from qexport.verifying.prompt_batches import Padding
from qexport.verifying.speed import MeasuredSpeed, compare_speed
from qexport.verifying.tasks.measuring import PairedTask, measure_tasks

_PERCENT: Final = Range(0.0, 100.0)

_FIGURES: Final[Sequence[tuple[str, Callable[[PromptComparison], float], Range]]] = (
    ("identical_generations", lambda result: float(result.identical), SHARE),
    ("first_divergence", lambda result: result.agreed_share, SHARE),
    ("generation_flips", lambda result: result.flips / result.reference_tokens, SHARE),
    ("edit_distance", lambda result: result.edit_distance, SHARE),
    ("chrf", lambda result: result.chrf, _PERCENT),
    ("rouge_l", lambda result: result.rouge_l, SHARE),
    ("repetition_change", lambda result: result.artifact_repetition - result.reference_repetition, DIFFERENCE),
    (
        "length_limit_change",
        lambda result: float(result.artifact_hit_limit) - float(result.reference_hit_limit),
        DIFFERENCE,
    ),
    ("length_ratio", lambda result: result.length_ratio, NOT_NEGATIVE),
)

_TRIALS: Final = {"identical_generations": 1, "length_limit_change": 1}
"""Figures whose value per prompt is yes or no, or a difference of two such: if a few prompts all say yes, it is not
certain that all would."""


@dataclass(frozen=True)
class MeasuredGenerations:
    """Continuations for the report, the figures over them, and notes on how they were made."""

    record: Generations
    figures: list[Figure]
    notes: list[str]


def measure_generations(
    reference: Openable,
    artifact: Openable,
    prompts: EncodedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    settings: VerifySettings,
    steps: Steps,
) -> MeasuredGenerations:
    """Continues every prompt with both models, one whole model after the other.

    Args:
        reference: the merged model.
        artifact: the artifact.
        prompts: what to continue.
        tokenizer: the model's.
        checkpoint: the merged model's files, which name the tokens that end a text.
        settings: the recipe's `verify`.
        steps: counts the continuations.
    """
    rounds = 1 + (settings.sampling.samples if settings.sampling else 0)
    steps.expect(2 * rounds * len(prompts.prompts))
    found = compare_generations(
        reference,
        artifact,
        prompts,
        tokenizer,
        greedy_settings(checkpoint, tokenizer, max_new_tokens=settings.max_new_tokens),
        lambda: steps.finished("continuing the prompts"),
        settings.sampling,
    )
    record = found.generations
    return MeasuredGenerations(record, _figures(record, prompts.prompts), padding_notes(found.padding))


def padding_notes(padding: Padding) -> list[str]:
    """A note if prompts of different lengths could not share a batch."""
    if padding.allowed or padding.kl is None:
        return []
    return [
        "only prompts of equal length were continued side by side: padding changes the model's predictions "
        f"by {padding.kl:.2g} nats"
    ]


def _figures(found: Generations, prompts: Sequence[Prompt]) -> list[Figure]:
    results = found.comparisons
    units = Units([prompt.domain for prompt in prompts], "prompt", None, len(prompts))

    def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
        return [
            chosen.mean(name, np.array([value(result) for result in results])[mask], within, trials=_TRIALS.get(name))
            for name, value, within in _FIGURES
        ]

    return [*by_domain(units, estimate), *_sensitivity(results, prompts), *_sampled(found, len(prompts))]


def _sensitivity(results: Sequence[PromptComparison], prompts: Sequence[Prompt]) -> list[Figure]:
    differences = style_sensitivity({result.id: result.edit_distance for result in results}, prompts)
    if not differences:
        return []
    domains = {prompt.pair: prompt.domain for prompt in prompts if prompt.pair is not None}
    units = Units([domains[pair] for pair in differences], "pair", None, len(differences))
    return [units.mean("style_sensitivity", np.array(list(differences.values())), DIFFERENCE)]


def _sampled(found: Generations, prompts: int) -> list[Figure]:
    """The unit is the prompt, whose samples are averaged."""
    if not found.samples:
        return []
    values = np.array([each.chrf for each in found.samples]).reshape(-1, prompts).mean(axis=0)
    return [Units([None] * prompts, "prompt", None, prompts).mean("sampled_chrf", values, _PERCENT)]


@dataclass(frozen=True)
class Pair:
    """Both models, and their shared tokenizer.

    Attributes:
        reference: the merged model.
        artifact: the artifact.
        checkpoint: the merged model's files.
        stored: the artifact on disk.
        tokenizer: the reference's.
    """

    reference: BlockRunner
    artifact: Openable
    checkpoint: Checkpoint
    stored: StoredModel
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Whole:
    """What was measured with whole models.

    Attributes:
        figures: of prompts and tasks.
        generations: None if no prompts were continued.
        tasks: of lm-evaluation-harness.
        unconfirmed: what could not be measured, and why.
        notes: for users.
    """

    figures: list[Figure] = field(default_factory=list)
    generations: Generations | None = None
    tasks: list[TaskRecord] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_whole(
    pair: Pair, prompts: EncodedPrompts | None, settings: VerifySettings, steps: Steps, progress: ProgressCallback
) -> Whole:
    """Continues the prompts and runs the tasks, one model after the other.

    Args:
        pair: the models.
        prompts: None for no prompts.
        settings: the recipe's `verify`.
        steps: counts the steps.
        progress: is called with what was skipped.
    """
    wanted = {"generations": prompts is not None, "tasks": settings.tasks is not None}
    needed, available = needed_memory(pair.reference), available_memory(pair.reference.device)
    if any(wanted.values()) and needed > available:
        names = [name for name, is_wanted in wanted.items() if is_wanted]
        sizes = f"the whole model needs {size(needed, decimals=1)}, {size(available, decimals=1)} are free"
        progress(Notice(f"not measured: {' and '.join(names)}; {sizes}"))
        return Whole(unconfirmed=[f"{name} (the model does not fit in memory)" for name in names])
    found = Whole()
    if prompts is not None:
        measured = measure_generations(
            pair.reference, pair.artifact, prompts, pair.tokenizer, pair.checkpoint, settings, steps
        )
        found.generations, found.figures, found.notes = measured.record, measured.figures, measured.notes
    if settings.tasks is not None:
        results = _ask(pair, settings.tasks, steps)
        found.tasks = [result.record for result in results]
        found.figures += [result.accuracy_change for result in results]
    return found


def measure_speed(
    pair: Pair, input_ids: Tensor, settings: SpeedSettings | None, dtype: torch.dtype, progress: ProgressCallback
) -> MeasuredSpeed:
    """Times both models as users load them, if both fit in memory.

    Args:
        pair: the models.
        input_ids: int64, held-out tokens.
        settings: the recipe's `verify.speed`.
        dtype: the reference's.
        progress: is called with what was skipped.
    """
    if settings is None:
        return MeasuredSpeed(None, "the recipe has no verify.speed")
    found = compare_speed(pair.checkpoint, pair.stored, input_ids, settings, dtype=dtype, device=pair.reference.device)
    if found.unmeasured:
        progress(Notice(f"speed was not measured: {found.unmeasured}"))
    return found


def _ask(pair: Pair, settings: TaskSettings, steps: Steps) -> list[PairedTask]:
    return measure_tasks(
        pair.reference.whole,
        pair.artifact.whole,
        pair.tokenizer,
        settings,
        lambda task: steps.finished(f"task {task}"),
    )
