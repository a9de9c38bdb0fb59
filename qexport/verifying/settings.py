"""The recipe's `verify`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qexport.gates.settings import GateSettings, ProfileName
from qexport.settings import Settings


class SamplingSettings(Settings):
    """Sampled continuations beside the greedy ones; both models sample with the same random numbers."""

    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed gives the same texts again."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Only the likeliest tokens that together have this probability are drawn."""

    samples: Annotated[int, Field(ge=1)] = 1
    """Texts for each prompt."""


class SpeedSettings(Settings):
    """Timing of both models as users load them, where both fit in memory together."""

    repeats: Annotated[int, Field(ge=6)] = 7
    """Measurements of each model, in turns. Fewer than 6 give no 95 % interval of a median."""

    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of held-out text that are read before the first new one."""

    new_tokens: Annotated[int, Field(ge=2)] = 16
    """Tokens that are generated, one after the other."""


class VerifySettings(Settings):
    """How the finished artifact is held against the merged reference."""

    text: str | list[str]
    """Held-out files (`.jsonl` with a `text` field, or `.txt`). Never the calibration text."""

    field: str = "text"
    """The field of a JSON line that holds the text."""

    windows: Annotated[int, Field(ge=1)] = 16
    """How many windows to measure before the gates are looked at for the first time."""

    max_windows: Annotated[int, Field(ge=1)] = 64
    """How many windows to measure at most, while a gate is undecided; fewer where the text ends before."""

    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window. Windows do not overlap."""

    prompts: str | None = None
    """A JSONL file with `id` and `prompt`; both models continue each one greedily."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens to generate for each prompt."""

    sampling: SamplingSettings | None = None
    """Sampled continuations of the prompts too; none by default."""

    speed: SpeedSettings | None = None
    """Tokens per second and time to first token; not measured by default."""

    profile: ProfileName = "auto"
    """The limits to start from. `auto` chooses by method and size; `off` sets none."""

    gates: GateSettings = {}
    """Limits on figures by name, in place of the profile's; null removes one of them. A gate that fails ends the run with
    exit code 6, one that is not decided with 7. docs/gates.md lists figures and profiles."""
