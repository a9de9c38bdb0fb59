"""Prompts, tasks and speed: with whole models in memory. Where they do not fit, prompts are continued block by block;
tasks and speed are skipped with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.amounts import size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.machine_memory import available_memory
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import Generations, PromptComparison, TaskRecord
from qexport.progress import Notice, ProgressCallback, Steps
from qexport.reading.stored_model import StoredModel
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE, Range
from qexport.text.prompts import EncodedPrompts, Prompt
from qexport.verifying import SpeedSettings, TaskSettings, VerifySettings
from qexport.verifying.continuation import greedy_settings
from qexport.verifying.continuing import Both, Openable, Passes, Task, as_stored, continue_by_blocks, continue_whole
from qexport.verifying.estimates import by_domain
from qexport.verifying.generation import compare_texts, style_sensitivity
from qexport.verifying.kept import NOTHING_KEPT, Kept
from qexport.verifying.memory import Way, choose_way, needed_memory
from qexport.verifying.prompt_batches import Padding
from qexport.verifying.speed import MeasuredSpeed, compare_speed
from qexport.verifying.tasks.measuring import PairedTask, measure_tasks
from qexport.verifying.units import Units

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
    pair: Pair, prompts: EncodedPrompts, settings: VerifySettings, way: Way, steps: Steps
) -> MeasuredGenerations:
    """Continues every prompt with both models.

    Args:
        pair: the models.
        prompts: what to continue.
        settings: the recipe's `verify`.
        way: what memory allows.
        steps: counts the continuations, or the blocks.
    """
    greedy = greedy_settings(pair.checkpoint, pair.tokenizer, max_new_tokens=settings.max_new_tokens)
    both = continue_prompts(pair, Task(prompts, greedy, settings.sampling, steps, pair.kept), way)
    record = compare_texts(both, prompts, pair.tokenizer, greedy, settings.sampling.seed if settings.sampling else 0)
    notes = [*pass_notes(both.passes), *padding_notes(both.padding)]
    return MeasuredGenerations(record, _figures(record, prompts.prompts), notes)


def continue_prompts(pair: Pair, task: Task, way: Way) -> Both:
    """Continues prompts with both models, in the way that memory allows."""
    if way == "whole":
        return continue_whole(pair.reference, pair.artifact, task)
    stored = partial(as_stored, pair.stored, pair.reference.dtype, pair.reference.device)
    drafter = stored if isinstance(pair.artifact, BlockRunner) else pair.artifact.whole
    return continue_by_blocks(pair.reference, pair.artifact, drafter if way == "drafted" else None, task)


def pass_notes(passes: Passes | None) -> list[str]:
    """A note if the models were not in memory as a whole: who drafted, and how often the blocks were read."""
    if passes is None:
        return []
    guesses = "the artifact, which does, drafted" if passes.drafted else "each pass guessed what the next one checked"
    counts = [f"{passes.reference} for the reference"]
    counts += [] if passes.artifact is None else [f"{passes.artifact} for the artifact"]
    return [
        "the prompts were continued block by block, since the model does not fit in memory as a whole: "
        f"{guesses}; passes over the blocks: {', '.join(counts)}"
    ]


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
        kept: what other artifacts' measurements have left of the reference, and this one's leaves.
    """

    reference: BlockRunner
    artifact: Openable
    checkpoint: Checkpoint
    stored: StoredModel
    tokenizer: PreTrainedTokenizerBase
    kept: Kept = NOTHING_KEPT


@dataclass
class Whole:
    """What was measured on prompts and tasks.

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
    found = Whole()
    needed, available = needed_memory(pair.reference), available_memory(pair.reference.device)
    sizes = f"the whole model needs {size(needed, decimals=1)}, {size(available, decimals=1)} are free"
    way = choose_way(pair.reference, pair.stored, available)
    if prompts is not None:
        if way != "whole":
            progress(Notice(f"the prompts are continued block by block; {sizes}"))
        measured = measure_generations(pair, prompts, settings, way, steps)
        found.generations, found.figures, found.notes = measured.record, measured.figures, measured.notes
    if settings.tasks is not None and way != "whole":
        progress(Notice(f"not measured: tasks; {sizes}"))
        found.unconfirmed.append("tasks (the model does not fit in memory)")
    elif settings.tasks is not None:
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
