"""Tensors that an adapter holds as a whole, and rows for trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.changes import Replace, ReplaceRows
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.merge.targets import saved, targeted


def plan_whole_tensors(plan: MergePlan, options: AdapterOptions, targets: list[str]) -> None:
    """Plans the replacement of whole tensors of the base. Call it before planning changes computed from them."""
    modules = saved(options, plan.base)
    for module in modules:
        for name, shape in plan.base.modules[module].tensors.items():
            plan.change(f"{module}.{name}", Replace(plan.factor(module, name, shape)))
            _expect_copies(plan, module, name, shape)
    _plan_embedding_copies(plan, set(targets), set(modules))
    _plan_biases(plan, options.bias, set(targets), set(modules))


def _expect_copies(plan: MergePlan, module: str, name: str, shape: tuple[int, ...]) -> None:
    """Beside a saved embedding of another size PEFT stores it once more, and as it was before the training."""
    trained, original = (f"{PREFIX}{module}.{kind}.{name}" for kind in ("modules_to_save", "original_module"))
    for key in (trained, original):
        if key in plan.adapter.file.specs():
            plan.tensor(key, shape)
    if trained in plan.expected and not plan.equal(trained, f"{PREFIX}{module}.{name}"):
        raise InputError(
            f"the adapter {plan.adapter.folder.name} holds two versions of {module}.{name}",
            where=f"{trained} and {PREFIX}{module}.{name}",
            mend="save it once more with PEFT's save_pretrained",
        )


def _plan_embedding_copies(plan: MergePlan, targets: set[str], modules: set[str]) -> None:
    """PEFT's save_embedding_layers stores the base's embeddings too; those replace the base's."""
    for end in dict.fromkeys((plan.base.embedding, plan.base.head)):
        if end in modules:
            continue
        inner = "base_layer." if end in targets else ""
        for kind, shape in plan.base.modules[end].tensors.items():
            for name in (f"{inner}{kind}", f"token_adapter.base_layer.{kind}"):
                if f"{PREFIX}{end}.{name}" in plan.adapter.file.specs():
                    plan.change(f"{end}.{kind}", Replace(plan.factor(end, name, shape)))
            _expect_copies(plan, end, kind, shape)


def _plan_biases(plan: MergePlan, bias: str, targets: set[str], modules: set[str]) -> None:
    """`all`: every bias of the model; `lora_only` and the like: those of the targeted modules."""
    if bias == "none":
        return
    if bias != "all" and not bias.endswith("_only"):
        raise CompatibilityError(f"unknown bias {bias!r}", where="adapter_config.json: bias", mend=MERGE_WITH_PEFT)
    for path, module in plan.base.modules.items():
        if not module.has_bias or path in modules or not (bias == "all" or path in targets):
            continue
        name = "base_layer.bias" if path in targets else "bias"
        plan.change(f"{path}.bias", Replace(plan.factor(path, name, module.tensors["bias"])))


_DELTA = "trainable_tokens_delta"
_WHERE = "adapter_config.json: trainable_token_indices"


class TrainableTokensOptions(AdapterOptions):
    """Options of TRAINABLE_TOKENS that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    token_indices: list[int]


def plan_token_adapter(plan: MergePlan) -> None:
    """Plans the merge of a TRAINABLE_TOKENS adapter."""
    options = TrainableTokensOptions.parse(plan.adapter.config)
    structure = plan.base.structure
    modules = [plan.base.embedding] if options.target_modules is None else targeted(options, plan.base)
    if structure.tied and f"{PREFIX}{plan.base.head}.{_DELTA}" in plan.adapter.file.specs():
        modules = list(dict.fromkeys([*modules, plan.base.head]))  # PEFT ties the head's rows and stores them too
    _plan_embedding_copies(plan, set(modules), set())
    for module in modules:
        _plan_rows(plan, module, _DELTA, options.token_indices)


def plan_trainable_tokens(
    plan: MergePlan, indices: list[int] | Mapping[str, list[int]] | None, *, wrapped: set[str]
) -> None:
    """Plans the trainable_token_indices of another type of adapter, which targets the modules `wrapped`.

    Raises:
        InputError: a token is not in the vocabulary, or no module has a given name.
    """
    by_name = indices if isinstance(indices, Mapping) else {plan.base.embedding: indices or []}
    for suffix, tokens in by_name.items():
        if not tokens:
            continue
        modules = [name for name in plan.base.modules if name.endswith(suffix)]
        if not modules:
            raise InputError(
                f"no module of the base ends in {suffix!r}",
                where=_WHERE,
                mend="give the base that the adapter was trained on",
            )
        for module in modules:
            if module in wrapped:
                plan.refuse(f"{module}: an adapter and trainable tokens on the same embedding", MERGE_WITH_PEFT)
            elif not _follows_embedding(plan, module, suffix, by_name):
                _plan_rows(plan, module, f"token_adapter.{_DELTA}", tokens)
    _plan_tied_rows(plan, by_name)


def _plan_tied_rows(plan: MergePlan, by_name: Mapping[str, list[int]]) -> None:
    """The rows of a tied head, which PEFT stores once more where it stores whole embeddings."""
    name, head = f"token_adapter.{_DELTA}", plan.base.head
    if not plan.base.structure.tied or f"{PREFIX}{head}.{name}" not in plan.adapter.file.specs():
        return
    tokens = next((tokens for suffix, tokens in by_name.items() if plan.base.embedding.endswith(suffix)), None)
    if tokens and f"{PREFIX}{head}.{name}" not in plan.expected:
        _plan_rows(plan, head, name, tokens)


def _follows_embedding(plan: MergePlan, module: str, suffix: str, by_name: Mapping[str, list[int]]) -> bool:
    """Whether this is a tied head with the embedding's tokens, which PEFT stores once."""
    structure = plan.base.structure
    if not (structure.tied and module == plan.base.head):
        return False
    return any(plan.base.embedding.endswith(name) and by_name[name] == by_name[suffix] for name in by_name)


def _plan_rows(plan: MergePlan, module: str, name: str, indices: list[int]) -> None:
    shape = plan.base.modules[module].tensors.get("weight", ())
    tokens = shape[0] if len(shape) == 2 else 0
    outside = sorted(index for index in indices if not 0 <= index < tokens)
    if not indices or outside or len(set(indices)) != len(indices):
        what = f"tokens {outside[:6]} are outside its {tokens} rows" if outside else "no tokens, or one twice"
        raise InputError(f"{module}: {what}", where=_WHERE, mend="give the base that the adapter was trained on")
    rows = plan.factor(module, name, (len(indices), shape[1]))
    plan.change(f"{module}.weight", ReplaceRows(rows, tuple(indices)))
