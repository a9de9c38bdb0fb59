"""Which linear layers are quantized, with what, and which of a block are solved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

from torch import Tensor, nn

from qexport.architectures.families import family, matching
from qexport.architectures.structure import LinearSpec, Structure
from qexport.errors import CompatibilityError
from qexport.quantize.settings import GptqSettings, Override
from qexport.quantize.solver import Options


@dataclass(frozen=True)
class Group:
    """Layers whose inputs are known when a forward is about to call one module.

    Attributes:
        stop: that module: the first of the layers, or an `ExpertStop`.
        members: the names of the layers that share an input, one tuple for each input.
        experts: for an `ExpertStop`, the expert of each of `members`.
    """

    stop: nn.Module
    members: tuple[tuple[str, ...], ...]
    experts: tuple[int, ...] | None = None

    def inputs(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The input of each of `members` [..., tokens, in], from what `stop` is called with."""
        if self.experts is None:
            return [args[0]]
        states, counts = args
        parts = states.split(list(counts))
        return [parts[expert] for expert in self.experts]


def find_groups(
    layers: Mapping[str, nn.Module], of_experts: Sequence[Group], forward: Callable[[], None]
) -> list[Group]:
    """Runs a forward once, and gives the groups in the order of its calls. Layers share the very same tensor.

    Args:
        layers: the modules to group, by name.
        of_experts: the groups that are known beforehand.
        forward: runs the block.
    """
    inputs: list[Tensor | None] = []
    groups: list[Group] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            for index, seen in enumerate(inputs):
                if seen is args[0]:
                    groups[index] = Group(groups[index].stop, ((*groups[index].members[0], name),))
                    return
            inputs.append(args[0])
            groups.append(Group(layer, ((name,),)))

        return hook

    def note_experts(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            inputs.append(None)
            groups.append(group)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    hooks += [group.stop.register_forward_pre_hook(note_experts(group)) for group in of_experts]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return groups


_LISTED = 8


def select(structure: Structure, settings: GptqSettings) -> dict[str, Options]:
    """The options of each linear layer to quantize, by module path; every other layer stays dense.

    Raises:
        CompatibilityError: a group size that does not divide a layer, an override that matches nothing, a tied head,
            or nothing left to quantize. All problems are in one message.
    """
    linears = candidates(structure, settings)
    problems = _unmatched(linears, settings.overrides) + _tied_head(structure, settings)
    chosen: dict[str, Options] = {}
    for linear in linears.values():
        override = _override(linear.name, settings.overrides)
        insisted = override is not None and not override.dense
        kept = matching(family(structure.model_type).keep_dense, linear.name) is not None
        if (kept and not insisted) or (override is not None and override.dense):
            continue
        chosen[linear.name] = _options(linear, settings, override)
    problems += _ragged(linears, chosen)
    if not chosen and not problems:
        problems.append("no layer is left to quantize: every linear layer is dense by override or family")
    if problems:
        raise CompatibilityError("\n".join(problems), where="quantize")
    return chosen


def candidates(structure: Structure, settings: GptqSettings) -> dict[str, LinearSpec]:
    """The linear layers among which the recipe chooses, by name: all inside the blocks, and the head if it says so."""
    linears = list(structure.block_linears)
    if settings.lm_head and not structure.tied:
        out_features, in_features = structure.parameters[f"{structure.head}.weight"]
        linears.append(LinearSpec(structure.head, out_features, in_features))
    return {linear.name: linear for linear in linears}


def _options(linear: LinearSpec, settings: GptqSettings, override: Override | None) -> Options:
    bits = override.bits if override and override.bits else settings.bits
    group_size = override.group_size if override and override.group_size else settings.group_size
    return Options(
        bits=bits,
        group_size=linear.in_features if group_size == -1 else group_size,
        order="dynamic" if settings.desc_act else "static" if settings.static_groups else "original",
        sym=settings.sym,
        damp_percent=settings.damp_percent,
        search=settings.mse,
    )


def _override(name: str, overrides: Iterable[Override]) -> Override | None:
    found = [override for override in overrides if fnmatchcase(name, override.modules)]
    return found[-1] if found else None


def _unmatched(candidates: Iterable[str], overrides: Iterable[Override]) -> list[str]:
    names = list(candidates)
    return [
        f"the override for {override.modules!r} matches no linear layer, for example {names[0]}"
        for override in overrides
        if not any(fnmatchcase(name, override.modules) for name in names)
    ]


def _tied_head(structure: Structure, settings: GptqSettings) -> list[str]:
    if settings.lm_head and structure.tied:
        return ["lm_head: true needs a head of its own, but this model's head is tied to its embedding"]
    return []


def _ragged(candidates: Mapping[str, LinearSpec], chosen: Mapping[str, Options]) -> list[str]:
    """One problem for each group size, with the layers that it does not divide and the sizes that would fit."""
    ragged: dict[int, list[LinearSpec]] = {}
    for name, options in chosen.items():
        if candidates[name].in_features % options.group_size:
            ragged.setdefault(options.group_size, []).append(candidates[name])
    return [_ragged_text(group_size, linears) for group_size, linears in ragged.items()]


def _ragged_text(group_size: int, linears: list[LinearSpec]) -> str:
    common = gcd(*(linear.in_features for linear in linears))
    divisors = [size for size in range(16, 1025) if common % size == 0]
    fits = [size for size in divisors if size.bit_count() == 1] or divisors  # kernels know powers of two best
    names = ", ".join(f"{linear.name} ({linear.in_features} inputs)" for linear in linears[:_LISTED])
    more = f" and {len(linears) - _LISTED} more" if len(linears) > _LISTED else ""
    return (
        f"group_size {group_size} does not divide the inputs of {len(linears)} layers: {names}{more}; "
        f"sizes that fit them all: {', '.join(map(str, [*fits, -1]))}"
    )
