"""(IA)^3."""

from __future__ import annotations

from typing import ClassVar

from qexport.merge.changes import Scale
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.patterns import full_matches
from qexport.merge.plan import Plan
from qexport.merge.targets import targeted
from qexport.merge.whole import plan_whole_tensors


class Ia3Options(AdapterOptions):
    """Options of IA3 that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights", "fan_in_fan_out"})

    feedforward_modules: list[str] | str


def plan_ia3(plan: Plan) -> None:
    """Plans the merge of an IA3 adapter: inputs are scaled in feedforward modules, outputs in the others.

    Raises:
        InputError: its options are impossible, or it targets nothing.
    """
    options = Ia3Options.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    feedforward = _feedforward(options.feedforward_modules, targets)
    for path in targets:
        module = plan.base.modules[path]
        if module.kind not in ("linear", "conv1d"):
            plan.refuse(f"{path}: (IA)^3 on a layer that is not linear", MERGE_WITH_PEFT)
            continue
        plan.adapts(path)
        shape = (1, module.inputs) if path in feedforward else (module.outputs, 1)
        scale = Scale(plan.factor(path, "ia3_l", shape), module.transposed)
        plan.change(f"{path}.weight", scale)
        if module.has_bias and path not in feedforward:
            plan.change(f"{path}.bias", scale)


def _feedforward(modules: list[str] | str, targets: list[str]) -> set[str]:
    if isinstance(modules, str):
        return full_matches(modules, targets, field="feedforward_modules")
    # PEFT compares the ends of names here, dots or no dots.
    return {name for name in targets if name.endswith(tuple(modules))}
