"""The harness's tasks and its evaluation of one model. Only imported if lm-eval is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import datasets
import evaluate as metrics_hub
import lm_eval.utils as harness_templates
import torch
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexport.errors import InputError, NumericalError, QexportError, RecipeError
from qexport.verifying import TaskSettings, names_file
from qexport.verifying.tasks.local_files import LocalTask, read_local_tasks
from qexport.verifying.tasks.measuring import Item, Scores

_METRICS: Final = ("acc", "exact_match")
"""If the recipe names no metric: the first of these that a task has."""


@contextmanager
def contained() -> Iterator[None]:
    """Restricts the harness, within the context, to what a run of qexport may do.

    Templates run in a sandbox, since the harness's own environment lets them reach any Python object. Metrics are not
    downloaded from the hub, since they are code. Standard output, progress bars and log messages are suppressed.
    """
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(harness_templates.env.filters)
    with ExitStack() as stack:
        stack.enter_context(_replaced(harness_templates, "env", sandbox))
        stack.enter_context(_replaced(metrics_hub, "load", _refuse_metric))
        stack.enter_context(_replaced(tqdm, "__init__", _without_bar(tqdm.__init__)))
        stack.enter_context(_quiet(logging.getLogger("lm_eval")))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


@dataclass(frozen=True)
class Question:
    """A task, ready to be run.

    Attributes:
        name: the task's.
        task: with its data.
        metric: says whether an answer is correct.
    """

    name: str
    task: ConfigurableTask
    metric: str


def build_questions(settings: TaskSettings) -> list[Question]:
    """The tasks that the recipe names, with groups expanded. Only within `contained`.

    Raises:
        RecipeError: a task is named twice, the harness has no task of a name, or a task does not have the metric.
        InputError: a task file is refused, data cannot be read, or a task cannot be built, draws its answers at random,
            or runs what the model writes.
    """
    questions: dict[str, Question] = {}
    named = any(not names_file(name) for name in settings.tasks)
    manager = TaskManager() if named else None
    for text in settings.tasks:
        for name, task in _build(text, manager).items():
            if name in questions:
                raise RecipeError(f"the task {name} is named twice", where="verify.tasks", mend="name it once")
            _refuse_sampling(name, task)
            _set_fewshot(task, settings)
            questions[name] = Question(name, task, _choose_metric(name, task, settings.metric))
    return list(questions.values())


class HarnessModel:
    """A model as the harness runs it. Only within `contained`.

    Log-probabilities are computed in float32 from the model's logits.

    Args:
        model: ready to run; neither its weights nor their ties are changed.
        tokenizer: the model's.
        settings: the recipe's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> None:
        self._model, self._settings = model, settings
        # The harness ties the weights again, which would undo the head's computation in float32.
        model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            self._lm = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=deepcopy(tokenizer),
                batch_size=settings.batch_size,
                softmax_dtype=torch.float32,
            )
        finally:
            del model.tie_weights

    def answer(self, question: Question) -> Scores:
        """Which items of the task the model answers correctly.

        Raises:
            InputError: the harness cannot run the task, or its metric is not 0 or 1.
            NumericalError: logits hold NaN or Inf.
        """
        name, task = question.name, question.task
        task.set_fewshot_seed(seed=self._settings.seed)
        with _finite_logits(self._model, name), _harness_errors(name):
            results = evaluate(
                self._lm,
                {"tasks": {name: task}},
                limit=self._settings.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        samples = results["samples"][name]
        answers = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        return Scores(
            task=name,
            metric=question.metric,
            filter=samples[0]["filter"],
            num_fewshot=task.config.num_fewshot,
            items=tuple(_item(name, sample, question.metric) for sample in answers),
        )


def _build(named: str, manager: TaskManager | None) -> dict[str, ConfigurableTask]:
    if manager is None or names_file(named):
        local = read_local_tasks(Path(named).expanduser())
        return {task.name: _build_local(task) for task in local}
    if named not in manager.all_tasks:
        close = get_close_matches(named, manager.all_tasks, n=3)
        raise RecipeError(
            f"the harness has no task {named!r}",
            where="verify.tasks",
            mend=f"did you mean {', '.join(close)}?" if close else "to use your own task file, give its path",
        )
    with _harness_errors(named):
        built = manager.load([named])["tasks"]
    return dict(built)


def _build_local(local: LocalTask) -> ConfigurableTask:
    config = dict(local.config)
    with _harness_errors(local.name):
        if local.splits is not None:
            tables = {split: datasets.Dataset.from_list(rows) for split, rows in local.splits.items()}
            config["custom_dataset"] = lambda **_: tables
        return ConfigurableTask(config=config)


def _refuse_sampling(name: str, task: ConfigurableTask) -> None:
    config = task.config
    problem = (
        "runs what the model writes" if config.unsafe_code else
        "draws its answers at random" if (config.generation_kwargs or {}).get("do_sample") else
        "asks each item several times" if config.repeats > 1 else None
    )  # fmt: skip
    if problem:
        raise InputError(f"the task {problem}", where=f"task {name}", mend="use a task with one greedy answer per item")


def _set_fewshot(task: ConfigurableTask, settings: TaskSettings) -> None:
    """As in the harness, a task that sets 0 keeps it."""
    own = task.config.num_fewshot
    wanted = own if own == 0 or settings.num_fewshot is None else settings.num_fewshot
    task.set_config(key="num_fewshot", value=wanted or 0)


def _choose_metric(name: str, task: ConfigurableTask, wanted: str | None) -> str:
    measured = task.aggregation()
    found = next((metric for metric in ([wanted] if wanted else _METRICS) if metric in measured), None)
    if found is None:
        raise RecipeError(
            f"the task does not measure {wanted or ' or '.join(_METRICS)}",
            where=f"task {name}",
            mend=f"it measures {', '.join(measured)}: set verify.tasks.metric, or remove the task",
        )
    return found


def _item(task: str, sample: Mapping[str, Any], metric: str) -> Item:
    value, index = float(sample[metric]), sample["doc_id"]
    if value not in (0.0, 1.0):
        raise InputError(f"{metric} must be 0 or 1 for each item, not {value}", where=f"task {task}, item {index}")
    digest = ".".join(sample[f"{part}_hash"] for part in ("doc", "prompt", "target"))
    return Item(index=index, digest=digest, right=value == 1.0)


@contextmanager
def _finite_logits(model: nn.Module, task: str) -> Iterator[None]:
    def check(_: nn.Module, __: Any, output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise NumericalError("logits hold NaN or Inf", where=f"task {task}")

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _harness_errors(task: str) -> Iterator[None]:
    """Reports errors of the harness, a template or a dataset as InputError, with their message."""
    try:
        yield
    except (QexportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # they raise exceptions of any type
        raise InputError(
            f"lm-evaluation-harness cannot run the task: {type(error).__name__}: {error}",
            where=f"task {task}",
            mend="correct the task file or its data; offline, only data in the cache can be read",
        ) from error


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _without_bar(start: Callable[..., None]) -> Callable[..., None]:
    def start_hidden(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **(options | {"disable": True}))

    return start_hidden


def _refuse_metric(name: str, *_: Any, **__: Any) -> Callable[..., Any]:
    raise InputError(
        "this metric would be downloaded from the hub as code", where=name, mend="remove the tasks with this metric"
    )
