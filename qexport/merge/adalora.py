"""AdaLoRA."""

from __future__ import annotations

from typing import ClassVar

from qexport.merge.changes import SingularValues
from qexport.merge.lora import TRAINING_OPTIONS, Alpha, Rank
from qexport.merge.options import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.plan import Plan
from qexport.merge.targets import targeted
from qexport.merge.tokens import plan_trainable_tokens
from qexport.merge.whole import plan_whole_tensors


class AdaLoraOptions(AdapterOptions):
    """Options of ADALORA that a merge depends on. It writes LoRA's own too, and heeds few of them."""

    without_effect: ClassVar[frozenset[str]] = TRAINING_OPTIONS | {
        "alpha_pattern", "beta1", "beta2", "deltaT", "init_lora_weights", "orth_reg_weight", "r",
        "target_r", "tfinal", "tinit", "total_step", "use_rslora",
    }  # fmt: skip

    init_r: Rank = 12
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, list[bool]] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def plan_adalora(plan: Plan) -> None:
    """Plans the merge of an ADALORA adapter.

    Raises:
        InputError: its options are impossible, or it targets nothing.
    """
    options = AdaLoraOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    # The keys are those of the singular values: `path.lora_E`.
    ranks = {key.rpartition(".")[0]: sum(kept) for key, kept in (options.rank_pattern or {}).items()}
    for path in targets:
        _plan_module(plan, path, options, ranks.get(path, options.init_r))
    plan_trainable_tokens(plan, options.trainable_token_indices, wrapped=set(targets))


def _plan_module(plan: Plan, path: str, options: AdaLoraOptions, rank: int) -> None:
    module = plan.base.modules[path]
    if module.kind not in ("linear", "conv1d"):
        plan.refuse(f"{path}: AdaLoRA on a layer that is not linear", MERGE_WITH_PEFT)
        return
    plan.adapts(path)
    change = SingularValues(
        a=plan.factor(path, "lora_A", (rank, module.inputs)),
        e=plan.factor(path, "lora_E", (rank, 1)),
        b=plan.factor(path, "lora_B", (module.outputs, rank)),
        # PEFT takes the rank where alpha is not positive.
        scaling=options.lora_alpha if options.lora_alpha > 0 else float(rank),
        rank=options.init_r,
        transposed=module.transposed,
    )
    plan.change(f"{path}.weight", change)
