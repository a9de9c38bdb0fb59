"""The recipe's `verify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qexport.settings import Settings


class VerifySettings(Settings):
    """How the finished artifact is held against the merged reference."""

    text: str | list[str]
    """Held-out files (`.jsonl` with a `text` field, or `.txt`). Never the calibration text."""

    field: str = "text"
    """The field of a JSON line that holds the text."""

    windows: Annotated[int, Field(ge=1)] = 32
    """How many windows to take; fewer where the text ends before."""

    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window. Windows do not overlap."""

    prompts: str | None = None
    """A JSONL file with `id` and `prompt`; both models continue each one greedily."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens to generate for each prompt."""

    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Gate: the largest mean KL divergence per token (nats) that is published. Exit code 6 above it."""


class TaskSettings(Settings):
    """Task accuracy of the reference and the artifact, by lm-evaluation-harness (the extra `tasks`)."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of the harness's tasks or groups, and task files of your own (`.yaml`) or folders of them."""

    metric: Literal["acc", "acc_norm", "exact_match"] | None = None
    """What makes an item right. By default acc, or exact_match where a task has no acc."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each item, except in tasks that set 0 themselves. By default the task's own number."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """The first items of each task to take; all of them by default."""

    batch_size: Annotated[int, Field(ge=1)] = 1
    """Requests that go through the model at once."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which solved examples an item gets: the same ones for both models."""
