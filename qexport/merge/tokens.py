"""Trainable tokens: new rows for some tokens, as a type of its own or beside LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from qexport.errors import InputError
from qexport.merge.adapter import PREFIX
from qexport.merge.changes import ReplaceRows
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.plan import Plan
from qexport.merge.targets import targeted

_DELTA = "trainable_tokens_delta"
_WHERE = "adapter_config.json: trainable_token_indices"


class TrainableTokensOptions(AdapterOptions):
    """Options of TRAINABLE_TOKENS that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    token_indices: list[int]


def plan_token_adapter(plan: Plan) -> None:
    """Plans the merge of a TRAINABLE_TOKENS adapter.

    Raises:
        InputError: its options are impossible, or it targets nothing.
    """
    options = TrainableTokensOptions.parse(plan.adapter.config)
    structure = plan.base.structure
    modules = [plan.base.embedding] if options.target_modules is None else targeted(options, plan.base)
    if structure.tied and f"{PREFIX}{plan.base.head}.{_DELTA}" in plan.adapter.file.specs():
        modules = list(dict.fromkeys([*modules, plan.base.head]))  # PEFT ties the head's rows and stores them too
    for module in modules:
        _plan_rows(plan, module, _DELTA, options.token_indices)


def plan_trainable_tokens(
    plan: Plan, indices: list[int] | Mapping[str, list[int]] | None, *, wrapped: set[str]
) -> None:
    """Plans the trainable_token_indices of another type of adapter, which targets the modules `wrapped`.

    Raises:
        InputError: a token is not in the vocabulary, or a module is not in the base.
    """
    by_name = indices if isinstance(indices, Mapping) else {plan.base.embedding: indices or []}
    for suffix, tokens in by_name.items():
        if not tokens:
            continue
        modules = [name for name in plan.base.modules if name.endswith(suffix)]
        if not modules:
            raise InputError(f"no module of the base is {suffix!r}", where=_WHERE)
        for module in modules:
            if module in wrapped:
                plan.refuse(f"{module}: an adapter and trainable tokens on the same embedding", MERGE_WITH_PEFT)
            elif not _follows_embedding(plan, module, suffix, by_name):
                _plan_rows(plan, module, f"token_adapter.{_DELTA}", tokens)


def _follows_embedding(plan: Plan, module: str, suffix: str, by_name: Mapping[str, list[int]]) -> bool:
    """A tied head with the embedding's own tokens, which PEFT stores once."""
    structure = plan.base.structure
    if not (structure.tied and module == plan.base.head):
        return False
    return any(plan.base.embedding.endswith(name) and by_name[name] == by_name[suffix] for name in by_name)


def _plan_rows(plan: Plan, module: str, name: str, indices: list[int]) -> None:
    shape = plan.base.modules[module].tensors.get("weight", ())
    tokens = shape[0] if len(shape) == 2 else 0
    outside = sorted(index for index in indices if not 0 <= index < tokens)
    if not indices or outside or len(set(indices)) != len(indices):
        what = f"tokens {outside[:6]} are outside its {tokens} rows" if outside else "no tokens, or one twice"
        raise InputError(f"{module}: {what}", where=_WHERE, mend="the adapter was made for another base model")
    rows = plan.factor(module, name, (len(indices), shape[1]))
    plan.change(f"{module}.weight", ReplaceRows(rows, tuple(indices)))
