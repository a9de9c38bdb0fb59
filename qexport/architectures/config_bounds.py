"""Bounds on the numbers in a config.json, before transformers sees them.

Many of them say how often something is done or how much is allocated while a model is described: labels, layers,
experts, positions. Every bound is several times what any published model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PretrainedConfig

from qexport.errors import InputError, listed


@dataclass(frozen=True)
class Bound:
    """What the values of some keys may be, at any depth.

    Attributes:
        keys: a pattern of the whole key.
        lowest: the smallest number.
        highest: the largest number.
        whole: the values are whole numbers, lists of them, or null; else any other value is left to transformers.
    """

    keys: re.Pattern[str]
    lowest: int
    highest: int
    whole: bool = False


_ANY: Final = 1 << 63

_EXPERTS: Final = re.compile(r"(num|n|moe_num|num_local|n_routed)_experts")
_ALL_EXPERTS: Final = 1 << 16
"""In all layers together."""

BOUNDS: Final = (
    Bound(re.compile(r".*(_ids?|_index|_indices|_indexes|theta|base|seed|temperature)"), -_ANY, _ANY),
    Bound(re.compile(r"num_hidden_layers|n_layers?|num_layers"), 1, 1 << 9, whole=True),
    Bound(re.compile(r".*layers|depths?"), -(1 << 10), 1 << 10),
    Bound(re.compile(r"num_(labels|classes)"), 0, 100_000, whole=True),
    Bound(re.compile(rf"{_EXPERTS.pattern}|num_experts_per_tok"), 0, 1 << 14, whole=True),
    Bound(re.compile(r"(num_attention|num_key_value|num_kv)_heads|n_head"), 1, 1 << 15, whole=True),
    Bound(re.compile(r".*(heads|experts)"), 0, 1 << 15),
    Bound(re.compile(r"(hidden|vocab)_size|n_embd"), 1, 1 << 24, whole=True),
    Bound(re.compile(r"intermediate_size|moe_intermediate_size|head_dim|n_inner|n_positions"), 0, 1 << 24, whole=True),
    Bound(re.compile(r".*(_size|_dim|position_embeddings|positions)"), -1, 1 << 28),
)
"""The first that matches a key counts."""

OTHERS: Final = Bound(re.compile(r".*"), -(1 << 31), 1 << 31)
"""Keys that none of `BOUNDS` names."""

_LONGEST_LIST: Final = 1 << 16


def refuse_extreme(config: Mapping[str, Any], *, where: str = "config.json") -> None:
    """Checks every number at any depth.

    Raises:
        InputError: numbers are beyond their bounds, or what must be a whole number is none; all of them are named.
    """
    problems = [f"{path}: {problem}" for path, problem in _problems(config, ())]
    if problems:
        raise InputError(
            "numbers that no model has" if len(problems) > 1 else "a number that no model has",
            where=f"{where}: {listed(problems)}",
            mend="fetch the file again",
        )


def refuse_many_experts(config: PretrainedConfig, layers: int) -> None:
    """Checks the number of experts in all layers together.

    Raises:
        InputError: there are too many.
    """
    counts = {key: value for key, value in config.to_dict().items() if _EXPERTS.fullmatch(key)}
    for key, count in counts.items():
        if isinstance(count, int) and layers * count > _ALL_EXPERTS:
            raise InputError(
                f"{layers} layers of {count} experts are more than the {_ALL_EXPERTS} experts that are accepted",
                where=f"config.json: {key}",
                mend="fetch the file again",
            )


def _problems(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        here = (*path, str(key))
        bound = next((bound for bound in BOUNDS if bound.keys.fullmatch(here[-1])), OTHERS)
        for item in _flat(value):
            if isinstance(item, Mapping):
                if bound.whole and item.keys() == {"__float__"}:
                    yield ".".join(here), f"{item['__float__']!r} is not a whole number"
                yield from _problems(item, here)
            elif problem := _problem(item, bound):
                yield ".".join(here), problem
        if isinstance(value, list) and len(value) > _LONGEST_LIST:
            yield ".".join(here), f"a list of {len(value)}; at most {_LONGEST_LIST} are read"


def _flat(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _problem(value: Any, bound: Bound) -> str | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    if bound.whole and not number and value is not None:
        return f"{_shown(value)} is not a whole number"
    sized = number or (isinstance(value, float) and bound is not OTHERS)
    if sized and not bound.lowest <= value <= bound.highest:
        return f"{_shown(value)} is not between {bound.lowest} and {bound.highest}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= _ANY:
        return "a number of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
