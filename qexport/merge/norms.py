"""LN tuning: norms trained as a whole."""

from __future__ import annotations

from qexport.merge.changes import Replace
from qexport.merge.options import AdapterOptions
from qexport.merge.plan import Plan
from qexport.merge.targets import targeted
from qexport.merge.whole import plan_whole_tensors


def plan_ln_tuning(plan: Plan) -> None:
    """Plans the merge of an LN_TUNING adapter.

    Raises:
        InputError: its options are impossible, or it targets nothing.
    """
    options = AdapterOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        for name, shape in plan.base.modules[path].tensors.items():
            plan.change(f"{path}.{name}", Replace(plan.factor(path, f"ln_tuning_layers.{name}", shape)))
