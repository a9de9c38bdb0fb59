"""Task accuracy of two models, one after the other in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexport.errors import RecipeError
from qexport.hidden_packages import hidden
from qexport.verifying.settings import TaskSettings
from qexport.verifying.tasks.pairing import PairedTask, Scores, pair

OpenModel = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Gives the model as long as the context lasts, for example `BlockRunner.whole`."""

_NEEDED: Final = {"lm_eval": (0, 4, 13), "datasets": (4, 0)}
"""Before version 4, `datasets` runs scripts that lie beside the data."""


def require_harness() -> None:
    """Makes sure that lm-evaluation-harness is installed; imports nothing.

    Raises:
        RecipeError: it is not, or too old, or `datasets` is.
    """
    for package, oldest in _NEEDED.items():
        needed = f"{package} {'.'.join(map(str, oldest))}"
        try:
            installed = version(package)
        except PackageNotFoundError as error:
            raise _missing(f"task accuracy needs {needed}, which is not installed") from error
        if tuple(map(int, re.findall(r"\d+", installed)))[: len(oldest)] < oldest:
            raise _missing(f"task accuracy needs {needed}; {installed} is installed")


def measure_tasks(
    reference: OpenModel,
    artifact: OpenModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings,
    finished: Callable[[str], None],
) -> list[PairedTask]:
    """Asks each model the same items of every task; never are both in memory.

    Args:
        reference: opens the merged model.
        artifact: opens the artifact.
        tokenizer: the models'; stays as it is.
        settings: the recipe's `verify.tasks`, with local paths resolved.
        finished: is told of each task that a model has answered, by its name: twice for each task.

    Raises:
        RecipeError: the harness is missing, a task is unknown or comes twice, or has not the metric.
        InputError: a task file, its data or a task of the harness cannot be used, or would run code.
        NumericalError: logits hold NaN or Inf.
    """
    require_harness()
    with hidden("bitsandbytes"):  # the harness imports PEFT
        from qexport.verifying.tasks.harness import HarnessModel, build_questions, contained

    def answers(open_model: OpenModel) -> list[Scores]:
        scores = []
        with open_model() as model:
            subject = HarnessModel(model, tokenizer, settings)
            for question in questions:
                scores.append(subject.answer(question))
                finished(question.name)
        return scores

    with contained():
        questions = build_questions(settings)
        return [pair(ours, theirs) for ours, theirs in zip(answers(reference), answers(artifact), strict=True)]


def _missing(what: str) -> RecipeError:
    return RecipeError(what, where="verify.tasks", mend="pip install qexport[tasks]")
