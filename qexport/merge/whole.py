"""Tensors that an adapter holds as a whole: modules_to_save, biases, and copies of the embeddings."""

from __future__ import annotations

from qexport.errors import CompatibilityError
from qexport.merge.adapter import PREFIX
from qexport.merge.changes import Replace
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.plan import Plan
from qexport.merge.targets import saved


def plan_whole_tensors(plan: Plan, options: AdapterOptions, targets: list[str]) -> None:
    """Plans what replaces tensors of the base. Comes before the changes that are computed from them."""
    modules = saved(options, plan.base)
    for module in modules:
        for name, shape in plan.base.modules[module].tensors.items():
            plan.change(f"{module}.{name}", Replace(plan.factor(module, name, shape)))
    _plan_embedding_copies(plan, set(targets), set(modules))
    _plan_biases(plan, options.bias, set(targets), set(modules))


def _plan_embedding_copies(plan: Plan, targets: set[str], modules: set[str]) -> None:
    """PEFT's save_embedding_layers stores the base's own embeddings too; they count as the base's from then on."""
    for end in (plan.base.embedding, plan.base.head):
        name = "base_layer.weight" if end in targets else "weight"
        if end not in modules and f"{PREFIX}{end}.{name}" in plan.adapter.file.specs():
            shape = plan.base.modules[end].tensors["weight"]
            plan.change(f"{end}.weight", Replace(plan.factor(end, name, shape)))


def _plan_biases(plan: Plan, bias: str, targets: set[str], modules: set[str]) -> None:
    """`all`: every bias of the model; `lora_only` and its like: those of the targeted modules."""
    if bias == "none":
        return
    if bias != "all" and not bias.endswith("_only"):
        raise CompatibilityError(f"unknown bias {bias!r}", where="adapter_config.json: bias", mend=MERGE_WITH_PEFT)
    for path, module in plan.base.modules.items():
        if not module.has_bias or path in modules or not (bias == "all" or path in targets):
            continue
        name = "base_layer.bias" if path in targets else "bias"
        plan.change(f"{path}.bias", Replace(plan.factor(path, name, module.tensors["bias"])))
