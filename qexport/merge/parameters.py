"""LoRA on bare parameters that hold all experts of a mixture (`target_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.architectures.naming import Part
from qexport.merge.adapter import MERGE_WITH_PEFT
from qexport.merge.changes import ReadFactor
from qexport.merge.plan import MergePlan


@dataclass(frozen=True)
class ExpertLowRank:
    """LoRA on one expert's rows of a parameter [experts, rows, in]: W + scaling * B A.

    Attributes:
        a: key of A of all experts [experts * r, in].
        b: key of B of all experts [rows, r * experts].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        experts: how many there are.
        part: the expert, and its rows.
    """

    a: str
    b: str
    scaling: float
    experts: int
    part: Part

    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        expert, rows = self.part.expert, slice(self.part.start, self.part.start + len(weight))
        assert expert is not None
        a, b = read(self.a), read(self.b)
        one = a.view(self.experts, -1, a.shape[1])[expert]
        other = b.view(len(b), -1, self.experts)[rows, :, expert]
        return torch.matmul(other, one).mul_(self.scaling).add_(weight)


def targeted_parameters(plan: MergePlan, named: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The parameters that target_parameters names, in the model's order, with their shapes."""
    return {
        f"{path}.{name}": shape
        for path, module in plan.base.modules.items()
        for name, shape in module.tensors.items()
        if "." not in name and any(f".{path}.{name}".endswith(f".{each}") for each in named)
    }


def plan_parameters(
    plan: MergePlan,
    parameters: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, Any],
    *,
    root: bool,
) -> None:
    """Plans LoRA on parameters.

    Args:
        plan: the plan.
        parameters: their shapes, by path.
        ranks: of each.
        alphas: of each.
        root: rsLoRA's scale.
    """
    for path, shape in parameters.items():
        parts = {name: part for name, part in plan.base.naming.parts.items() if part.parameter == path}
        if len(shape) != 3 or any(part.expert is None for part in parts.values()) or not parts:
            plan.refuse(f"{path}: LoRA on a bare parameter that does not hold experts one by one", MERGE_WITH_PEFT)
            continue
        experts, outputs, inputs = shape
        module, inner = _wrapper(path, parameters)
        a = plan.factor(module, f"{inner}lora_A.weight", (ranks[path] * experts, inputs))
        b = plan.factor(module, f"{inner}lora_B.weight", (outputs, ranks[path] * experts))
        scaling = alphas[path] / (math.sqrt(ranks[path]) if root else ranks[path])
        for name, part in parts.items():
            plan.change(name, ExpertLowRank(a, b, scaling, experts, part))


def _wrapper(path: str, parameters: Mapping[str, Any]) -> tuple[str, str]:
    """The module of a parameter, and where its factors are in it: PEFT wraps the module once for each parameter."""
    module = path.rpartition(".")[0]
    together = [each for each in parameters if each.rpartition(".")[0] == module]
    return module, "base_layer." * (len(together) - 1 - together.index(path))
