"""Several LoRA adapters combined into one, factor by factor, as PEFT's `add_weighted_adapter` combines them.

Every factor of the combined adapter is computed when it is read, from the same factor of each adapter, so the memory is
that of one layer's factors. What is merged then, and held against PEFT, is one LoRA adapter with a scale of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch

from qexport.errors import CompatibilityError, listed
from qexport.merge import MergeSettings
from qexport.merge.adapter import Adapter
from qexport.merge.changes import LowRank, Replace
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.merge.targets import BaseModel
from qexport.merge.types import planner
from qexport.tensors.source import TensorSpec

_MEND = "merge one of them, save the model, and merge the others into it; or train one adapter on both tasks"


@dataclass(frozen=True)
class Combination:
    """What an adapter is a combination of.

    Attributes:
        adapters: each has been read, in the recipe's order.
        weights: of each.
        settings: which combination, with its density and its seed.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    settings: MergeSettings


@dataclass(frozen=True)
class _Factor:
    """A factor of one adapter.

    Attributes:
        adapter: which.
        key: its key there.
        scaling: alpha / r of its layer.
    """

    adapter: int
    key: str
    scaling: float


def combined(parts: Combination, base: BaseModel) -> Adapter:
    """The combination of LoRA adapters, as an adapter whose tensors are computed when they are read.

    Args:
        parts: what to combine, and how.
        base: what all of the adapters are for.

    Raises:
        InputError: an adapter does not fit the base, or holds NaN or Inf.
        CompatibilityError: one is more than LoRA's factors, or ranks differ where they must not.
    """
    found = dict[str, list[tuple[_Factor, _Factor]]]()
    for index, adapter in enumerate(parts.adapters):
        for path, change in _factors(adapter, base).items():
            a, b = (_Factor(index, key, change.scaling) for key in (change.a, change.b))
            found.setdefault(path, []).append((a, b))
    source = CombinedFactors(parts, found)
    ranks = source.ranks()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": parts.adapters[0].config.get("base_model_name_or_path"),
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
    }
    if len(set(ranks.values())) > 1:
        config |= {"rank_pattern": dict(ranks), "alpha_pattern": dict(ranks)}
    return Adapter(parts.adapters[0].folder, config, "LORA", source)


def _factors(adapter: Adapter, base: BaseModel) -> Mapping[str, LowRank]:
    """The LoRA of each module of an adapter that is nothing else, by the module's path."""
    if adapter.peft_type != "LORA":
        raise _not_combined(adapter, f"it is {adapter.peft_type}, and only LoRA has factors that combine")
    plan = MergePlan(adapter, base)
    planner(adapter.peft_type)(plan)
    if adapter.config.get("layer_replication"):
        raise _not_combined(adapter, "it was trained on repeated layers")
    plan.raise_refusals()
    if plan.parts_ends:
        raise _not_combined(adapter, "it changes the tied embedding and head differently")
    found = dict[str, LowRank]()
    for weight, steps in plan.changes.items():
        match steps:
            case [LowRank() as change] if weight.endswith(".weight"):
                found[weight.removesuffix(".weight")] = change
            case [Replace(), LowRank()]:
                raise _not_combined(adapter, f"it brings {weight} of its own base")
            case _:
                raise _not_combined(adapter, f"it changes {weight} otherwise than by two factors")
    plan.checked_changes()
    plan.check_finite()
    return found


def _not_combined(adapter: Adapter, reason: str) -> CompatibilityError:
    return CompatibilityError(
        f"the adapter {adapter.folder.name} cannot be combined with others: {reason}",
        where="load.adapters",
        mend=_MEND,
    )


class CombinedFactors:
    """A `WeightSource`: the factors of the combined adapter by PEFT's keys, in float32.

    Args:
        parts: where the factors are, and how they are combined.
        layers: by module, A and B of each adapter that has it.

    Raises:
        CompatibilityError: the ranks of a module differ, and the combination is not `cat`.
    """

    def __init__(self, parts: Combination, layers: Mapping[str, Sequence[tuple[_Factor, _Factor]]]) -> None:
        self._adapters, self._weights, self._settings = parts.adapters, parts.weights, parts.settings
        self._method = parts.settings.combination if len(parts.adapters) > 1 else "linear"  # as in PEFT
        self._layers = {_path(pairs[0][0].key): pairs for pairs in layers.values()}
        self._factors = {
            pairs[0][side].key: ([each[side] for each in pairs], side) for pairs in layers.values() for side in (0, 1)
        }
        self._specs = {key: self._spec(key) for key in self._factors}

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource.specs`."""
        return self._specs

    def ranks(self) -> Mapping[str, int]:
        """The rank of each module, by its path as PEFT names it."""
        return {path: self._specs[pairs[0][0].key].shape[0] for path, pairs in self._layers.items()}

    def _spec(self, key: str) -> TensorSpec:
        factors, side = self._factors[key]
        shapes = [self._shape(each) for each in factors]
        ranks = [shape[side] for shape in shapes]
        if self._method == "cat":
            total = [*shapes[0]]
            total[side] = sum(ranks)
            return TensorSpec(tuple(total), torch.float32)
        if len(set(ranks)) > 1:
            raise CompatibilityError(
                f"the adapters have different ranks, which {self._method} cannot combine",
                where=listed([f"{each.key}: {rank}" for each, rank in zip(factors, ranks, strict=True)]),
                mend="set merge.combination to cat",
            )
        return TensorSpec(shapes[0], torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """The combined factor."""
        factors, side = self._factors[name]
        tensors = [self._adapters[each.adapter].read(each.key) for each in factors]
        weights = self._weights_of(factors)
        method, density = self._method, self._settings.density
        if method == "cat":  # B as it is, A with weight and scale
            scaled = [t * w * f.scaling for t, w, f in zip(tensors, weights, factors, strict=True)]
            return torch.cat(tensors if side else scaled, dim=side).contiguous()
        if method == "ties" and density < 1:
            tensors = [_largest(tensor, density) for tensor in tensors]
        elif method in ("dare_linear", "dare_ties") and density < 1:
            masks = self._masks(_path(name), side)
            tensors = [tensor * mask / density for tensor, mask in zip(tensors, masks, strict=True)]
        scales = [weight * each.scaling for weight, each in zip(weights, factors, strict=True)]
        roots = [math.sqrt(abs(scale)) * (-1 if scale < 0 and side == 0 else 1) for scale in scales]
        stacked = torch.stack(tensors)
        weighted = stacked * torch.tensor(roots).view(-1, *[1] * tensors[0].dim())
        return _elected(stacked, weighted) if method in ("ties", "dare_ties") else weighted.sum(dim=0)

    def _weights_of(self, factors: Sequence[_Factor]) -> list[float]:
        return [self._weights[each.adapter] for each in factors]

    def _masks(self, path: str, side: int) -> list[torch.Tensor]:
        """The masks for the factors of one side of a layer: PEFT draws those of all A first, then those of all B."""
        drawn = [self._shape(pair[each]) for each in range(side + 1) for pair in self._layers[path]]
        masks = random_masks(drawn, self._settings.density, layer_seed(self._settings.seed, path))
        return masks[-len(self._layers[path]) :]

    def _shape(self, factor: _Factor) -> tuple[int, ...]:
        return self._adapters[factor.adapter].file.specs()[factor.key].shape


def _path(key: str) -> str:
    """The module of a factor, as PEFT names it."""
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The tensor with zeros for all but its largest values."""
    mask = torch.zeros(tensor.numel())
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def layer_seed(seed: int, path: str) -> int:
    """The random state in which the values of a layer are dropped, so that layers can be read in any order and again.

    PEFT, started in this state for a layer, drops the same values.
    """
    return int.from_bytes(sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1


def random_masks(shapes: Sequence[Sequence[int]], density: float, seed: int) -> list[torch.Tensor]:
    """Masks of ones and zeros for DARE (arXiv:2311.03099), float32, drawn one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.bernoulli(torch.full(tuple(shape), density), generator=generator) for shape in shapes]


def _elected(tensors: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    """TIES (arXiv:2306.01708): the mean of those values whose sign is that of their sum over all adapters.

    Args:
        tensors: [adapters, ...], pruned.
        weighted: the same, weighted.
    """
    majority = torch.where(tensors.sum(dim=0) >= 0, 1, -1)
    agreeing = tensors.sign() == majority
    return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1.0)
