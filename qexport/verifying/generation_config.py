"""Whether an artifact's generation_config.json makes the same texts as the reference's.

transformers, vLLM and SGLang take sampling, penalties, lengths and end tokens from this file unless a request says
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import GenerationConfig, PretrainedConfig

_OF_THE_WRITER: Final = frozenset({"transformers_version", "_from_model_config", "_commit_hash"})
_SETS: Final = frozenset({"eos_token_id", "suppress_tokens", "begin_suppress_tokens"})
"""Values that are one token or several, in any order."""

_DEFAULTS: Final[Mapping[str, Any]] = GenerationConfig._get_default_generation_params()
"""What transformers 5.23 takes where a key is missing or null."""


@dataclass(frozen=True)
class GenerationSide:
    """What one model's folder says about generation.

    Attributes:
        file: the content of generation_config.json; None if there is none.
        config: config.json as transformers reads it, from which it takes the settings if there is no file.
    """

    file: Mapping[str, Any] | None
    config: PretrainedConfig

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that transformers uses."""
        return GenerationConfig.from_model_config(self.config).to_dict() if self.file is None else self.file


def generation_differences(reference: GenerationSide, artifact: GenerationSide) -> list[str]:
    """Each key with another meaning than in the reference, with both values.

    Keys that are missing, null or have the default mean the same, and so do one end token and a list of one. If a
    folder has no file, the settings are those that transformers derives from its config.json.
    """
    wanted, found = reference.settings, artifact.settings
    return [
        f"{key} is {_shown(found.get(key))}, not {_shown(wanted.get(key))}"
        for key in sorted((wanted.keys() | found.keys()) - _OF_THE_WRITER)
        if _meaning(key, wanted.get(key)) != _meaning(key, found.get(key))
    ]


def _meaning(key: str, value: Any) -> Any:
    default = _DEFAULTS.get(key)
    if value is None or (default is None and (value is False or value in ([], {}))):
        return default
    if key in _SETS:
        tokens = value if isinstance(value, list) else [value]
        return sorted(set(tokens)) if all(type(token) is int for token in tokens) else value
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.80}"
