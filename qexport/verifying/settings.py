"""The recipe's `verify`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qexport.gates.settings import GateSettings, ProfileName
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

    profile: ProfileName = "auto"
    """The limits to start from. `auto` chooses by method and size; `off` sets none."""

    gates: GateSettings = {}
    """Limits on figures by name, in place of the profile's; null removes one of them. A gate that fails ends the run
    with exit code 6, one that is not decided with 7. docs/gates.md lists figures and profiles."""
