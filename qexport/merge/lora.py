"""LoRA, rsLoRA, DoRA and AdaLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.changes import Add, LowRank, SingularValues, WeightDecomposed
from qexport.merge.parameters import plan_parameters, targeted_parameters
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.merge.targets import Module, suffix_matches, targeted
from qexport.merge.whole_tensors import plan_trainable_tokens, plan_whole_tensors

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]

TRAINING_OPTIONS = frozenset(
    {
        "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "layer_replication", "loftq_config",
        "lora_dropout", "lora_ga_config", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip
"""Fields of LoRA and similar types that do not affect a merge. (fan_in_fan_out: PEFT too uses the kind of layer;
layer_replication: the base has the layers already, see `with_layers`.)"""

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LEAVES_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")

_REFUSED: Mapping[str, tuple[str, str]] = {
    "monteclora_config": ("MonteCLoRA samples its weights", MERGE_WITH_PEFT),
    "kasa_config": ("KaSA truncates the base's weights before training", MERGE_WITH_PEFT),
    "use_bdlora": ("block-diagonal LoRA is stored in another shape", MERGE_WITH_PEFT),
    "velora_config": ("VeLoRA stores its projections beside the factors", MERGE_WITH_PEFT),
    "megatron_config": ("the adapter was made for Megatron's parallel layers", "convert it to plain LoRA first"),
    "use_qalora": ("QA-LoRA belongs to one quantized base and cannot be merged", "train a LoRA adapter instead"),
    "alora_invocation_tokens": (
        "activated LoRA acts only after its invocation tokens; no single set of weights does that",
        "serve it as an adapter (the base alone can be quantized: leave load.adapter out)",
    ),
    "arrow_config": (
        "Arrow chooses among adapters for each token; no single set of weights does that",
        "merge one of its adapters",
    ),
}  # fmt: skip


class LoraOptions(AdapterOptions):
    """Options of LoRA that a merge depends on."""

    without_effect: ClassVar[frozenset[str]] = TRAINING_OPTIONS | frozenset(_REFUSED)

    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    init_lora_weights: bool | str | None = True
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def plan_lora(plan: MergePlan) -> None:
    """Plans the merge of a LORA adapter."""
    options = LoraOptions.parse(plan.adapter.config)
    _refuse_variants(plan, options)
    plan.raise_refusals()
    parameters = targeted_parameters(plan, options.target_parameters or ())
    # An adapter that only trains tokens or saves modules targets nothing; its target_modules is an empty list.
    none = options.target_modules == [] or (options.target_modules is None and parameters)
    targets = [] if none else [*targeted(options, plan.base)]
    targets += _tied_head(plan, targets)
    plan_whole_tensors(plan, options, targets)
    ranks = _by_module(options.rank_pattern, options.r, [*targets, *parameters], "rank_pattern")
    alphas = _by_module(options.alpha_pattern, options.lora_alpha, [*targets, *parameters], "alpha_pattern")
    plan_parameters(plan, parameters, ranks, alphas, root=options.use_rslora)
    for path in targets:
        _plan_module(plan, path, options, ranks[path], alphas[path])
    plan_trainable_tokens(plan, options.trainable_token_indices, wrapped=set(targets))


def _tied_head(plan: MergePlan, targets: list[str]) -> list[str]:
    """The head, if `ensure_weight_tying` gave it the embedding's factors, which PEFT stores for both."""
    base, held = plan.base, f"{PREFIX}{plan.base.head}.lora_A.weight" in plan.adapter.file.specs()
    tied = base.structure.tied and plan.adapter.config.get("ensure_weight_tying") and base.embedding in targets
    return [base.head] if tied and held and base.head not in targets else []


def _refuse_variants(plan: MergePlan, options: LoraOptions) -> None:
    for name, (reason, mend) in _REFUSED.items():
        if plan.adapter.config.get(name):
            plan.refuse(f"{name}: {reason}", mend)
    if options.use_dora and options.lora_bias:
        plan.refuse("lora_bias: neither PEFT nor qexport supports it with DoRA", "train without lora_bias")
    start = options.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        plan.refuse(
            f"init_lora_weights {start!r}: training started from base weights other than this base's",
            "save it again as plain LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion",
        )
    elif start is not None and start not in _LEAVES_THE_BASE:
        plan.refuse(f"init_lora_weights {start!r} is unknown and may have changed the base", MERGE_WITH_PEFT)


def _by_module(pattern: Mapping[str, Any] | None, default: float, targets: list[str], field: str) -> Mapping[str, Any]:
    """The value of each module: that of the first key that matches its end, as in PEFT's `get_pattern_key`."""
    values: dict[str, Any] = {}
    for key, value in (pattern or {}).items():
        for name in suffix_matches(key, targets, field=field):
            values.setdefault(name, value)
    return {name: values.get(name, default) for name in targets}


def _plan_module(plan: MergePlan, path: str, options: LoraOptions, rank: int, alpha: float) -> None:
    module = plan.base.modules[path]
    if module.kind == "other":
        plan.refuse(f"{path}: LoRA on a layer that is neither linear nor an embedding", MERGE_WITH_PEFT)
        return
    plan.refuse_unmergeable(path)
    low_rank = _low_rank(plan, path, module, rank, alpha / (math.sqrt(rank) if options.use_rslora else rank))
    if options.use_dora:
        magnitude = plan.factor(path, "lora_magnitude_vector", (module.outputs,))
        plan.change(f"{path}.weight", WeightDecomposed(low_rank, magnitude))
    else:
        plan.change(f"{path}.weight", low_rank)
    if options.lora_bias:
        _plan_bias(plan, path, module, low_rank.scaling)


def _low_rank(plan: MergePlan, path: str, module: Module, rank: int, scaling: float) -> LowRank:
    a, b = (
        ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    return LowRank(
        plan.factor(path, a, (rank, module.inputs)),
        plan.factor(path, b, (module.outputs, rank)),
        scaling,
        module.transposed,
    )


def _plan_bias(plan: MergePlan, path: str, module: Module, scaling: float) -> None:
    if not module.has_bias:
        plan.refuse(f"{path}: lora_bias needs a bias in the base, which has none here", "train without lora_bias")
        return
    plan.change(f"{path}.bias", Add(plan.factor(path, "lora_B.bias", (module.outputs,)), scaling))


class AdaLoraOptions(AdapterOptions):
    """Options of ADALORA that a merge depends on. Its configuration also holds those of LoRA, and it ignores most."""

    without_effect: ClassVar[frozenset[str]] = TRAINING_OPTIONS | {
        "alpha_pattern", "beta1", "beta2", "deltaT", "init_lora_weights", "orth_reg_weight", "r",
        "target_r", "tfinal", "tinit", "total_step", "use_rslora",
    }  # fmt: skip

    init_r: Rank = 12
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, list[bool]] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def plan_adalora(plan: MergePlan) -> None:
    """Plans the merge of an ADALORA adapter."""
    options = AdaLoraOptions.parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    plan_whole_tensors(plan, options, targets)
    # The keys are those of the singular values: `path.lora_E`.
    ranks = {key.rpartition(".")[0]: sum(kept) for key, kept in (options.rank_pattern or {}).items()}
    for path in targets:
        _plan_adalora_module(plan, path, options, ranks.get(path, options.init_r))
    plan_trainable_tokens(plan, options.trainable_token_indices, wrapped=set(targets))


def _plan_adalora_module(plan: MergePlan, path: str, options: AdaLoraOptions, rank: int) -> None:
    module = plan.base.modules[path]
    if module.kind not in ("linear", "conv1d"):
        plan.refuse(f"{path}: AdaLoRA on a layer that is not linear", MERGE_WITH_PEFT)
        return
    plan.refuse_unmergeable(path)
    change = SingularValues(
        a=plan.factor(path, "lora_A", (rank, module.inputs)),
        e=plan.factor(path, "lora_E", (rank, 1)),
        b=plan.factor(path, "lora_B", (module.outputs, rank)),
        # PEFT uses the rank if alpha is not positive.
        scaling=options.lora_alpha if options.lora_alpha > 0 else float(rank),
        rank=options.init_r,
        transposed=module.transposed,
    )
    plan.change(f"{path}.weight", change)
