"""VeRA."""

from __future__ import annotations

from typing import ClassVar

from qexport.merge.changes import SharedProjections
from qexport.merge.lora import Rank
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.plan import Plan
from qexport.merge.targets import targeted
from qexport.merge.whole import plan_whole_tensors


class VeraOptions(AdapterOptions):
    """Options of VERA that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "vera_dropout"}
    )

    r: Rank = 256
    save_projection: bool = True


def plan_vera(plan: Plan) -> None:
    """Plans the merge of a VERA adapter, whose file must hold the projections that all its layers share.

    Raises:
        InputError: its options are impossible, or it targets nothing.
    """
    options = VeraOptions.parse(plan.adapter.config)
    if not options.save_projection:
        plan.refuse("save_projection: the adapter leaves its projections to a random seed", MERGE_WITH_PEFT)
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


def _plan_module(plan: Plan, path: str, a: str, b: str, rank: int) -> None:
    module = plan.base.modules[path]
    plan.adapts(path)
    change = SharedProjections(
        a,
        b,
        lambda_d=plan.factor(path, "vera_lambda_d", (rank,)),
        lambda_b=plan.factor(path, "vera_lambda_b", (module.outputs,)),
        inputs=module.inputs,
        transposed=module.transposed,
    )
    plan.change(f"{path}.weight", change)
