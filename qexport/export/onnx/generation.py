"""Where a text ends, and how its tokens are drawn, as the model's files say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.tensors import Checkpoint
from qexport.tensors.strict_json import parse_json
from qexport.text.tokenizer_files import GENERATION_CONFIG

_NUMBERS: Final = 1 << 31
"""onnxruntime-genai reads numbers of 32 bits."""

_SAMPLING: Final = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Generation:
    """What a program that generates text must know besides the graph.

    Attributes:
        ends: the tokens that end a text, in rising order; none where the files name none.
        begin: the token that begins a text, if there is one.
        padding: the token that fills up a batch, if there is one.
        sampling: `do_sample`, `temperature` and the like, as far as generation_config.json gives them.
    """

    ends: tuple[int, ...]
    begin: int | None
    padding: int | None
    sampling: Mapping[str, bool | int | float]


def generation(checkpoint: Checkpoint) -> Generation:
    """From generation_config.json, and from config.json where that is silent. What is no token's number is left out.

    Raises:
        InputError: generation_config.json is no JSON.
    """
    own = parse_json(checkpoint.files.get(GENERATION_CONFIG, b"{}"), where=GENERATION_CONFIG)
    configs = [own if isinstance(own, dict) else {}, checkpoint.config]

    def tokens(key: str) -> list[int]:
        return next((found for config in configs if (found := _tokens(config.get(key)))), [])

    return Generation(
        ends=tuple(sorted(set(tokens("eos_token_id")))),
        begin=next(iter(tokens("bos_token_id")), None),
        padding=next(iter(tokens("pad_token_id")), None),
        sampling={key: configs[0][key] for key in _SAMPLING if _usable(configs[0].get(key))},
    )


def _tokens(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and 0 <= token < _NUMBERS]


def _usable(value: Any) -> bool:
    """NaN and infinity are in no range."""
    return isinstance(value, (bool, int, float)) and -_NUMBERS < value < _NUMBERS
