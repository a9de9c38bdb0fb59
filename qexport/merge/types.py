"""The types of adapters: how each is merged, or why it is refused. (IA)^3, VeRA, LN tuning, SHiRA and BEFT are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.changes import Add, AddAt, Replace, Scale, SharedProjections
from qexport.merge.lora import Rank, plan_adalora, plan_lora
from qexport.merge.plan import MergePlan
from qexport.merge.shared_layers import plan_shared_layers
from qexport.merge.stored import PREFIX
from qexport.merge.targets import full_matches, targeted
from qexport.merge.through_peft import plan_through_peft
from qexport.merge.whole_tensors import plan_token_adapter, plan_whole_tensors


class Ia3Options(AdapterOptions):
    """Options of IA3 that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights", "fan_in_fan_out"})

    feedforward_modules: list[str] | str


def plan_ia3(plan: MergePlan) -> None:
    """Plans the merge of an IA3 adapter: inputs are scaled in feedforward modules, outputs in the others."""
    options = Ia3Options.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    feedforward = _feedforward(options.feedforward_modules, targets)
    for path in targets:
        module = plan.base.modules[path]
        if module.kind not in ("linear", "conv1d"):
            plan.refuse(f"{path}: (IA)^3 on a layer that is not linear", MERGE_WITH_PEFT)
            continue
        plan.refuse_unmergeable(path)
        shape = (1, module.inputs) if path in feedforward else (module.outputs, 1)
        scale = Scale(plan.factor(path, "ia3_l", shape), module.transposed)
        plan.change(f"{path}.weight", scale)
        if module.has_bias and path not in feedforward:
            plan.change(f"{path}.bias", scale)


def _feedforward(modules: list[str] | str, targets: list[str]) -> set[str]:
    if isinstance(modules, str):
        return full_matches(modules, targets, field="feedforward_modules")
    # PEFT compares the ends of names here, not whole components.
    return {name for name in targets if name.endswith(tuple(modules))}


class VeraOptions(AdapterOptions):
    """Options of VERA that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "vera_dropout"}
    )

    r: Rank = 256
    save_projection: bool = True


def plan_vera(plan: MergePlan) -> None:
    """Plans the merge of a VERA adapter, whose file must hold the projections that all its layers share."""
    options = VeraOptions.parse(plan.adapter.config)
    if not options.save_projection:
        plan.refuse("save_projection: the adapter stores only the random seed of its projections", MERGE_WITH_PEFT)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    linear = [path for path in targets if plan.base.modules[path].kind in ("linear", "conv1d")]
    for path in set(targets).difference(linear):
        plan.refuse(f"{path}: VeRA on a layer that is not linear", MERGE_WITH_PEFT)
    inputs = max((plan.base.modules[path].inputs for path in linear), default=0)
    outputs = max((plan.base.modules[path].outputs for path in linear), default=0)
    a = plan.tensor("base_model.vera_A", (options.r, inputs))
    b = plan.tensor("base_model.vera_B", (outputs, options.r))
    for path in linear:
        _plan_module(plan, path, a, b, options.r)


def _plan_module(plan: MergePlan, path: str, a: str, b: str, rank: int) -> None:
    module = plan.base.modules[path]
    plan.refuse_unmergeable(path)
    change = SharedProjections(
        a,
        b,
        lambda_d=plan.factor(path, "vera_lambda_d", (rank,)),
        lambda_b=plan.factor(path, "vera_lambda_b", (module.outputs,)),
        inputs=module.inputs,
        transposed=module.transposed,
    )
    plan.change(f"{path}.weight", change)


def plan_ln_tuning(plan: MergePlan) -> None:
    """Plans the merge of an LN_TUNING adapter."""
    options = AdapterOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        for name, shape in plan.base.modules[path].tensors.items():
            plan.change(f"{path}.{name}", Replace(plan.factor(path, f"ln_tuning_layers.{name}", shape)))


class ShiraOptions(AdapterOptions):
    """Options of SHIRA that a merge depends on. The rank gives only the number of values."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights", "mask_type", "random_seed"})

    r: Rank = 32


def plan_shira(plan: MergePlan) -> None:
    """Plans the merge of a SHIRA adapter."""
    options = ShiraOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        module = plan.base.modules[path]
        if module.kind != "linear":
            plan.refuse(f"{path}: SHiRA on a layer that is not linear", MERGE_WITH_PEFT)
            continue
        plan.refuse_unmergeable(path)
        places = options.r * (module.inputs + module.outputs)
        values = plan.factor(path, "shira_weight", (places,))
        indices = plan.tensor(f"{PREFIX}{path}.shira_indices", (2, places), integer=True)
        plan.change(f"{path}.weight", AddAt(values, indices))


class BeftOptions(AdapterOptions):
    """Options of BEFT that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"init_weights"})


def plan_beft(plan: MergePlan) -> None:
    """Plans the merge of a BEFT adapter, which adds a vector to what a layer computes: to its bias."""
    options = BeftOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        module = plan.base.modules[path]
        if not module.has_bias:
            plan.refuse(
                f"{path}: BEFT adds to the layer's bias, and this base has none there",
                "train a LoRA adapter instead, or remove load.adapter and serve the adapter beside the model",
            )
            continue
        plan.refuse_unmergeable(path)
        plan.change(f"{path}.bias", Add(plan.factor(path, "beft_bias", (1, module.outputs)), 1.0))


def plan_boft(plan: MergePlan) -> None:
    """Plans the merge of a BOFT adapter."""
    if any(key.endswith(".boft_R") and spec.shape[0] > 1 for key, spec in plan.adapter.file.specs().items()):
        plan.refuse("boft_n_butterfly_factor: PEFT multiplies several factors only with a CUDA kernel", MERGE_WITH_PEFT)
        plan.raise_refusals()
    plan_through_peft(plan)


Planner = Callable[[MergePlan], None]

PLANNERS: Mapping[str, Planner] = {
    "LORA": plan_lora,
    "ADALORA": plan_adalora,
    "IA3": plan_ia3,
    "LN_TUNING": plan_ln_tuning,
    "TRAINABLE_TOKENS": plan_token_adapter,
    "VERA": plan_vera,
    "BEFT": plan_beft,
    "BOFT": plan_boft,
    "SHIRA": plan_shira,
    "ROAD": partial(plan_through_peft, biases=True),
    **dict.fromkeys(
        (
            "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS", "OFT",
            "PEANUT", "SUPERTUNING", "WAVEFT",
        ),
        plan_through_peft,
    ),
    **dict.fromkeys(("PVERA", "RANDLORA", "TINYLORA", "VBLORA"), plan_shared_layers),
}  # fmt: skip
"""How each type that can be merged is planned."""

_VIRTUAL_TOKENS = "it puts learned vectors before the input or into the attention's cache, and changes no weight"

UNMERGEABLE: Mapping[str, str] = {
    "ADAPTION_PROMPT": "it adds gated attention over learned prompts, which no weight of the base can express",
    "CARTRIDGE": _VIRTUAL_TOKENS,
    "CPT": _VIRTUAL_TOKENS,
    "LILY": "a router mixes its factors differently for each token",
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "POLY": "it mixes its adapters differently for each task",
    "PREFIX_TUNING": _VIRTUAL_TOKENS,
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "SHADOW": "a second network beside the model feeds its layers",
    "XLORA": "it mixes its adapters differently for each token",
}
"""Why other types cannot be merged, by any tool."""

_SPLIT = "it splits the base's weights by their singular values when it wraps them, and stores only what it trained"

LEFT_TO_PEFT: Mapping[str, str] = {
    "ADAMSS": f"{_SPLIT}, grouped with scikit-learn",
    "FROD": "its bases come from a decomposition of all layers' weights at once",
    "GLORA": "it adds biases that depend on the layers' weights",
    "OSF": _SPLIT,
    "PSOFT": _SPLIT,
    "UNILORA": "it draws the places of its values from a seed, layer after layer",
}
"""Types that PEFT merges with the whole model in memory, and why qexport does not, block by block."""

GONE: Mapping[str, str] = {"BONE": "MISS"}
"""Types that PEFT no longer has, and what took their place."""


def planner(peft_type: str) -> Planner:
    """How an adapter of this type is planned.

    Raises:
        CompatibilityError: the type cannot be merged, or not by qexport.
        InputError: the type is unknown.
    """
    where = "adapter_config.json: peft_type"
    if peft_type in PLANNERS:
        return PLANNERS[peft_type]
    if peft_type in UNMERGEABLE:
        raise CompatibilityError(
            f"{peft_type} cannot be merged: {UNMERGEABLE[peft_type]}",
            where=where,
            mend="train a LoRA adapter instead, or remove load.adapter and serve the adapter beside the model",
        )
    if peft_type in LEFT_TO_PEFT:
        reason = f"qexport does not merge {peft_type}: {LEFT_TO_PEFT[peft_type]}"
        raise CompatibilityError(reason, where=where, mend=MERGE_WITH_PEFT)
    if peft_type in GONE:
        raise CompatibilityError(
            f"{peft_type} is no longer in PEFT, which has {GONE[peft_type]} instead",
            where=where,
            mend=f"with the version of PEFT that trained it, {MERGE_WITH_PEFT}",
        )
    raise InputError(
        f"unknown type of adapter: {peft_type!r}", where=where, mend=f"known types are {', '.join(sorted(PLANNERS))}"
    )
