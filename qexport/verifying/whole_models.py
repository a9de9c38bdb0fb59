"""Measurements that need whole models in memory: prompts, tasks, speed. Skipped with a note if they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.amounts import size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import Generations, TaskRecord
from qexport.progress import Notice, ProgressCallback
from qexport.reading.stored_model import StoredModel
from qexport.text.prompts import EncodedPrompts
from qexport.verifying.generation import Openable
from qexport.verifying.memory import available_memory, needed_memory
from qexport.verifying.prompt_figures import measure_generations
from qexport.verifying.settings import SpeedSettings, TaskSettings, VerifySettings
from qexport.verifying.speed import MeasuredSpeed, compare_speed
from qexport.verifying.steps import Steps
from qexport.verifying.tasks.measuring import PairedTask, measure_tasks


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
