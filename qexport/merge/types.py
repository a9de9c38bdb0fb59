"""The types of adapters: how each is merged, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qexport.errors import CompatibilityError, InputError
from qexport.merge.adapter import MERGE_WITH_PEFT
from qexport.merge.lora import plan_adalora, plan_lora
from qexport.merge.plan import MergePlan
from qexport.merge.small_types import plan_ia3, plan_ln_tuning, plan_vera
from qexport.merge.through_peft import plan_through_peft
from qexport.merge.whole_tensors import plan_token_adapter

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
