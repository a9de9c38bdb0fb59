"""The finished artifact compared with its reference: perplexity, divergence, generation.

The recipe's `verify` is here.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from qexport.gates import GateSettings, ProfileName
from qexport.runtimes import RuntimeSettings, each_once
from qexport.settings import Settings

ENDINGS: Final = (".yaml", ".yml")
"""File name endings of task files."""

_EXPLICIT: Final = ("./", "../", "/", "~")


def names_file(task: str) -> bool:
    """Whether an entry of `tasks` names a task file or a folder of them, not a task of the harness."""
    return task.startswith(_EXPLICIT) or task in {".", ".."} or task.endswith(ENDINGS)


class SamplingSettings(Settings):
    """Sampled continuations in addition to the greedy ones; both models sample with the same random numbers."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """The same seed gives the same texts."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Only the likeliest tokens that together have this probability are drawn."""

    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Sampled continuations per prompt."""


class SpeedSettings(Settings):
    """Timing of the artifact beside the reference in transformers, if there is memory for it: through the runtimes of
    `through`; without them only of ONNX graphs and unquantized weights.
    """

    repeats: Annotated[int, Field(ge=6, le=1000)] = 7
    """Measurements of each model, in turns. Fewer than 6 give no 95 % interval of a median."""

    prompt_tokens: Annotated[int, Field(ge=1, le=131_072)] = 128
    """Tokens of held-out text in the prompt."""

    new_tokens: Annotated[int, Field(ge=2, le=16_384)] = 16
    """Tokens to generate after the prompt."""


class TaskSettings(Settings):
    """Task accuracy of the reference and the artifact, by lm-evaluation-harness (the extra `tasks`)."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of the harness's tasks or groups, and task files of your own (`.yaml`) or folders of them."""

    metric: Literal["acc", "acc_norm", "exact_match"] | None = None
    """The metric that says whether an answer is correct. By default acc, or exact_match if a task has no acc."""

    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Solved examples before each item, except in tasks that set 0 themselves. By default the task's own number."""

    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """How many items of each task to take, from the first one on; all of them by default."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Requests that go through the model at once."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Decides which solved examples an item gets: the same ones for both models."""

    margin: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How much of its accuracy the artifact may lose in each task, 0.02 for two points: a gate on every task. It passes
    where the whole interval of the change lies above that. None by default."""


class FormatSettings(Settings):
    """Prompts whose answers must have a form: JSON under a schema, tool calls, code that parses."""

    prompts: str
    """A JSONL file with `id`, `prompt` or `messages`, and `format`, see docs/verification.md."""

    max_new_tokens: Annotated[int, Field(ge=1, le=16_384)] = 256
    """Tokens of an answer, at most. An answer that is cut off is mostly invalid, for both models."""


class RefusalSettings(Settings):
    """Harmless and harmful requests, refused or not by both models."""

    prompts: str
    """A JSONL file with `id`, `messages` or `prompt`, and `kind`: `harmful` or `harmless`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=16_384)] = 48
    """Tokens of an answer, at most: a refusal is found in its first 200 characters."""


class VerifySettings(Settings):
    """How the finished artifact is compared with the merged reference."""

    text: str | Annotated[list[str], Field(min_length=1)]
    """Held-out files (`.jsonl` with a `text` field, or `.txt`). Never the calibration text."""

    field: str = "text"
    """The field of a JSON line that holds the text."""

    windows: Annotated[int, Field(ge=1, le=1_000_000)] = 24
    """How many windows to measure before the gates are decided for the first time."""

    max_windows: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """How many windows to measure at most, while a gate is undecided; fewer if the text is shorter."""

    sequence_length: Annotated[int, Field(ge=2, le=131_072)] = 512
    """Tokens per window. Windows do not overlap."""

    prompts: str | None = None
    """A JSONL file with `id`, `prompt` or `messages`, and optionally `domain`, `style` and `pair`; both models continue
    each prompt greedily."""

    max_new_tokens: Annotated[int, Field(ge=1, le=16_384)] = 32
    """Tokens to generate for each prompt."""

    sampling: SamplingSettings | None = None
    """Sampled continuations of the prompts; none by default."""

    speed: SpeedSettings | None = None
    """Tokens per second and time to first token; not measured by default."""

    tasks: TaskSettings | None = None
    """Task accuracy by lm-evaluation-harness; not measured by default."""

    formats: FormatSettings | None = None
    """Answers that must have a form; not measured by default."""

    refusals: RefusalSettings | None = None
    """Requests that are refused or not; not measured by default."""

    lengths: Annotated[list[Annotated[int, Field(ge=64, le=1_048_576)]], Field(min_length=1)] | None = None
    """Lengths in tokens, for example `[512, 4096, 16384]`: drift on windows of each, and facts recalled from texts of
    each. Those beyond the model's `max_position_embeddings` are left out."""

    length_windows: Annotated[int, Field(ge=2, le=1000)] = 6
    """Windows of each length; fewer if the held-out text is shorter."""

    needles: Annotated[int, Field(ge=0, le=1000)] = 10
    """Texts of each length with a fact to recall, generated; 0 for none."""

    through: Annotated[list[RuntimeSettings], AfterValidator(each_once)] = []
    """Runtimes that the artifact is also measured through, with the same gates. A run skips those that cannot load a
    layout."""

    baseline: str | None = None
    """The release that is in production: its report.json, a folder with it, or its artifact's folder. The artifact may
    not be worse, see docs/gates.md; none by default."""

    baseline_margin: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """How much further than the release the artifact may drift, as a share of the release's own drift."""

    profile: ProfileName = "auto"
    """The limits to start from. `auto` chooses by method and size, `strict` allows half as much, `off` sets none."""

    gates: GateSettings = {}
    """Limits on figures by name, in place of the profile's; null removes one of them. A gate that fails ends the run
    with exit code 6, one that is not decided with 7. docs/gates.md lists figures and profiles."""
