"""The types of adapters: how each is merged, or why it is refused. (IA)^3, VeRA and LN tuning are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.changes import Replace, Scale, SharedProjections
from qexport.merge.lora import Rank, plan_adalora, plan_lora
from qexport.merge.plan import MergePlan
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


Planner = Callable[[MergePlan], None]

PLANNERS: Mapping[str, Planner] = {
    "LORA": plan_lora,
    "ADALORA": plan_adalora,
    "IA3": plan_ia3,
    "LN_TUNING": plan_ln_tuning,
    "TRAINABLE_TOKENS": plan_token_adapter,
    "VERA": plan_vera,
    **dict.fromkeys(("C3A", "FOURIERFT", "HRA", "LOHA", "LOKR", "MISS", "OFT"), plan_through_peft),
}
"""How each type that can be merged is planned."""

_VIRTUAL_TOKENS = "it puts learned vectors before the input or into the attention's cache, and changes no weight"

UNMERGEABLE: Mapping[str, str] = {
    "ADAPTION_PROMPT": "it adds gated attention over learned prompts, which no weight of the base can express",
    "CARTRIDGE": _VIRTUAL_TOKENS,
    "CPT": _VIRTUAL_TOKENS,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "POLY": "it mixes its adapters differently for each task",
    "PREFIX_TUNING": _VIRTUAL_TOKENS,
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "XLORA": "it mixes its adapters differently for each token",
}
"""Why other types cannot be merged, by any tool."""

LEFT_TO_PEFT = frozenset(
    {
        "ADAMSS", "BEFT", "BOFT", "BONE", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA", "LILY", "OSF",
        "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA",
        "VBLORA", "WAVEFT",
    }
)  # fmt: skip
"""Types that qexport leaves to PEFT: their layers share state, or no user has requested them. BOFT compiles a CUDA
extension for each layer that it wraps, and computes something else if that fails."""


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
        raise CompatibilityError(f"qexport does not merge {peft_type}", where=where, mend=MERGE_WITH_PEFT)
    raise InputError(
        f"unknown type of adapter: {peft_type!r}", where=where, mend=f"known types are {', '.join(sorted(PLANNERS))}"
    )
