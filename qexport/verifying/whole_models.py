"""What needs whole models in memory: prompts, tasks, speed. It is left out, and named, where they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import Generations, Speed, TaskRecord
from qexport.progress import Notice, Reporter
from qexport.statistics.samples import DIFFERENCE
from qexport.tensors import Checkpoint
from qexport.text.prompts import EncodedPrompts
from qexport.verifying.estimates import Units
from qexport.verifying.generation import Openable
from qexport.verifying.memory import available_memory, needed_memory
from qexport.verifying.prompt_figures import measure_generations
from qexport.verifying.settings import SpeedSettings, TaskSettings, VerifySettings
from qexport.verifying.speed import NotMeasured, SpeedFigures, compare_speed, median_interval
from qexport.verifying.steps import Steps
from qexport.verifying.tasks.measuring import measure_tasks
from qexport.verifying.tasks.pairing import TaskResult


@dataclass(frozen=True)
class Pair:
    """Both models, and what they share.

    Attributes:
        reference: the merged model.
        artifact: the artifact.
        checkpoint: the merged model's files.
        folder: the artifact's.
        tokenizer: the reference's.
    """

    reference: BlockRunner
    artifact: Openable
    checkpoint: Checkpoint
    folder: Path
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Whole:
    """What whole models were measured on.

    Attributes:
        figures: of prompts and tasks.
        generations: None where no prompts were continued.
        tasks: of lm-evaluation-harness.
        unconfirmed: what could not be measured, and why.
        notes: for the reader.
    """

    figures: list[Figure] = field(default_factory=list)
    generations: Generations | None = None
    tasks: list[TaskRecord] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredSpeed:
    """Timings of both models, or why there are none."""

    speed: Speed | None
    unmeasured: str | None
    figures: list[Figure]


def measure_whole(
    pair: Pair, prompts: EncodedPrompts | None, settings: VerifySettings, steps: Steps, report: Reporter
) -> Whole:
    """Continues the prompts and asks the tasks, one model after the other.

    Args:
        pair: the models.
        prompts: None for nothing.
        settings: the recipe's `verify`.
        steps: is told of each.
        report: is told what was left out.
    """
    wanted = {"generations": prompts is not None, "tasks": settings.tasks is not None}
    needed, available = needed_memory(pair.reference), available_memory(pair.reference.device)
    if any(wanted.values()) and needed > available:
        names = [name for name, is_wanted in wanted.items() if is_wanted]
        sizes = f"the whole model needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        report(Notice(f"not measured: {' and '.join(names)}; {sizes}"))
        return Whole(unconfirmed=[f"{name} (the model does not fit in memory)" for name in names])
    found = Whole()
    if prompts is not None:
        measured = measure_generations(
            pair.reference, pair.artifact, prompts, pair.tokenizer, pair.checkpoint, settings, steps
        )
        found.generations, found.figures, found.notes = measured.record, measured.figures, measured.notes
    if settings.tasks is not None:
        results = _ask(pair, settings.tasks, steps)
        found.tasks = [_task_record(result) for result in results]
        found.figures += [accuracy_change(result) for result in results]
    return found


def measure_speed(
    pair: Pair, input_ids: Tensor, settings: SpeedSettings | None, dtype: torch.dtype, report: Reporter
) -> MeasuredSpeed:
    """Times both models as their users load them, where both fit in memory.

    Args:
        pair: the models.
        input_ids: int64, held-out tokens.
        settings: the recipe's `verify.speed`.
        dtype: the reference's.
        report: is told what was left out.
    """
    if settings is None:
        return MeasuredSpeed(None, "the recipe has no verify.speed", [])
    found = compare_speed(pair.checkpoint, pair.folder, input_ids, settings, dtype=dtype, device=pair.reference.device)
    if isinstance(found, NotMeasured):
        report(Notice(f"speed was not measured: {found.reason}"))
        return MeasuredSpeed(None, found.reason, [])
    ratios = {"speed_ratio": found.speed_ratios, "first_token_ratio": found.first_token_ratios}
    return MeasuredSpeed(_speed(found), None, [_median(name, values) for name, values in ratios.items()])


def _ask(pair: Pair, settings: TaskSettings, steps: Steps) -> list[TaskResult]:
    return measure_tasks(
        pair.reference.whole,
        pair.artifact.whole,
        pair.tokenizer,
        settings,
        lambda task: steps.finished(f"task {task}"),
    )


def _task_record(result: TaskResult) -> TaskRecord:
    return TaskRecord(
        task=result.task,
        metric=result.metric,
        num_fewshot=result.num_fewshot,
        sha256=result.sha256,
        items=result.items,
        reference_accuracy=result.reference_accuracy,
        artifact_accuracy=result.artifact_accuracy,
        only_reference=result.only_reference,
        only_artifact=result.only_artifact,
        p_value=result.p_value,
    )


def accuracy_change(result: TaskResult) -> Figure:
    """The figure of one task. A few items of which none has changed do not make it certain that none ever does."""
    units = Units([None] * result.items, "item", None, result.items)
    differences = np.array(result.differences, dtype=np.float64)
    figure = units.mean("accuracy_change", differences, DIFFERENCE, trials=1)
    return figure.model_copy(update={"domain": result.task})


def _speed(found: SpeedFigures) -> Speed:
    return Speed(
        prompt_tokens=found.prompt_tokens,
        new_tokens=found.new_tokens,
        reference_tokens_per_second=found.reference.tokens_per_second.tolist(),
        artifact_tokens_per_second=found.artifact.tokens_per_second.tolist(),
        reference_first_token_seconds=found.reference.first_token.tolist(),
        artifact_first_token_seconds=found.artifact.first_token.tolist(),
        reference_bytes=found.reference.resident_bytes,
        artifact_bytes=found.artifact.resident_bytes,
    )


def _median(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Figure:
    """Gates are decided on the same interval: the number of repeats is fixed before."""
    found = median_interval(values)
    low, high = found.low, found.high
    return Figure(
        name=name,
        value=found.value,
        low=low,
        high=high,
        sequence_low=low,
        sequence_high=high,
        n=len(values),
        unit="repeat",
    )
