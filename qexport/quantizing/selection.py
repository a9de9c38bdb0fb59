"""Which linear layers a method quantizes, and with which options. Known from the headers, before any load."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd

from qexport.architectures.families import family, matching
from qexport.architectures.structure import LinearSpec, Structure
from qexport.errors import CompatibilityError
from qexport.quantizing.gptq import Gptq, Override
from qexport.quantizing.method import Method, RoundingMethod
from qexport.quantizing.solver import Options
from qexport.tensors import OutputSpec, TensorSpec

_LISTED = 8


def select(structure: Structure, method: Gptq) -> dict[str, Options]:
    """The options of each linear layer to quantize, by module path; every other layer stays at 16 bits.

    Raises:
        CompatibilityError: a group size that does not divide a layer, an override that matches nothing, a tied head,
            or nothing left to quantize. All problems are in one message.
    """
    linears = candidates(structure, method)
    problems = _unmatched("overrides", [override.modules for override in method.overrides], linears)
    problems += _tied_head(structure, method)
    chosen: dict[str, Options] = {}
    for linear in linears.values():
        override = _override(linear.name, method.overrides)
        insisted = override is not None and not override.dense
        kept = _kept_by_family(structure, linear.name)
        if (kept and not insisted) or (override is not None and override.dense):
            continue
        chosen[linear.name] = _options(linear, method, override)
    problems += _ragged(linears, chosen, method.group_sizes)
    if not chosen and not problems:
        problems.append("no layer is left to quantize: overrides or the family keep every linear layer at 16 bits")
    if problems:
        raise CompatibilityError("\n".join(problems), where="quantize")
    return chosen


def _kept_by_family(structure: Structure, name: str) -> bool:
    return matching(family(structure.model_type).keep_unquantized, name) is not None


def candidates(structure: Structure, method: Gptq) -> dict[str, LinearSpec]:
    """The linear layers that the recipe can choose, by name: all in the blocks, and the head if `lm_head` is set."""
    linears = list(structure.block_linears)
    if method.lm_head and not structure.tied:
        out_features, in_features = structure.parameters[f"{structure.head}.weight"]
        linears.append(LinearSpec(structure.head, out_features, in_features))
    return {linear.name: linear for linear in linears}


def _options(linear: LinearSpec, method: Gptq, override: Override | None) -> Options:
    bits = override.bits if override and override.bits else method.bits
    group_size = override.group_size if override and override.group_size else method.group_size
    return solver_options(method, bits, linear.in_features if group_size == -1 else group_size)


def solver_options(method: Gptq, bits: int, group_size: int) -> Options:
    """The method's settings as the solver takes them, for a layer with these bits and this group size."""
    return Options(
        bits=bits,
        group_size=group_size,
        order=method.order,
        sym=method.sym,
        damp_percent=method.damp_percent,
        search=method.mse,
        refine=method.effort == "high",
    )


def _override(name: str, overrides: Iterable[Override]) -> Override | None:
    found = [override for override in overrides if fnmatchcase(name, override.modules)]
    return found[-1] if found else None


def _unmatched(key: str, patterns: Iterable[str], names: Collection[str], which: str = "") -> list[str]:
    """One problem for each pattern of the recipe's `key` that is the name of no linear layer in question."""
    example = f", for example {min(names)}" if names else "; this family has none"
    return [
        f"{key}: {pattern!r} matches no linear layer{which}{example}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def refuse_unmatched(key: str, patterns: Iterable[str], structure: Structure) -> None:
    """Refuses patterns of the recipe's `key` that match no linear layer in a block.

    Raises:
        CompatibilityError: there are such.
    """
    if problems := _unmatched(key, patterns, {linear.name for linear in structure.block_linears}):
        raise CompatibilityError("\n".join(problems), where="quantize")


def _tied_head(structure: Structure, method: Gptq) -> list[str]:
    if method.lm_head and structure.tied:
        return ["lm_head: true needs an untied head, but this model's head is tied to its embedding"]
    return []


def _ragged(
    candidates: Mapping[str, LinearSpec], chosen: Mapping[str, Options], sizes: Sequence[int] | None
) -> list[str]:
    """One problem for each group size, with the layers that it does not divide and the sizes that would fit."""
    ragged: dict[int, list[LinearSpec]] = {}
    for name, options in chosen.items():
        if candidates[name].in_features % options.group_size:
            ragged.setdefault(options.group_size, []).append(candidates[name])
    return [_ragged_text(group_size, linears, sizes) for group_size, linears in ragged.items()]


def _ragged_text(group_size: int, linears: list[LinearSpec], sizes: Sequence[int] | None) -> str:
    offered = _fitting(gcd(*(linear.in_features for linear in linears)), sizes)
    names = ", ".join(f"{linear.name} ({linear.in_features} inputs)" for linear in linears[:_LISTED])
    more = f" and {len(linears) - _LISTED} more" if len(linears) > _LISTED else ""
    return (
        f"group_size {group_size} does not divide the inputs of {len(linears)} layers: {names}{more}; "
        f"sizes that fit them all: {', '.join(map(str, offered)) or 'none; leave these layers out'}"
    )


def _fitting(inputs: int, sizes: Sequence[int] | None) -> list[int]:
    """The group sizes that divide a number of inputs: of some, or of all that GPTQ takes."""
    if sizes is not None:
        return [size for size in sizes if inputs % size == 0]
    divisors = [size for size in range(16, 1025) if inputs % size == 0]
    powers = [size for size in divisors if size.bit_count() == 1]  # kernels support powers of two best
    return [*(powers or divisors), -1]


def select_rounded(structure: Structure, method: RoundingMethod) -> list[LinearSpec]:
    """The linear layers that a rounding method quantizes: all in the blocks except those that the family or the recipe
    keeps at 16 bits.

    Raises:
        CompatibilityError: a pattern matches nothing, a layer is refused, or nothing is left to quantize. All problems
            are in one message.
    """
    linears = [linear for linear in structure.block_linears if method.experts or not linear.expert]
    kept = {linear.name for linear in linears if _kept_by_family(structure, linear.name)}
    problems = _unmatched("skip_modules", method.skip_modules, {linear.name for linear in linears})
    problems += _unmatched("force_modules", method.force_modules, kept, " that the family keeps at 16 bits")
    kept = {name for name in kept if not _any(method.force_modules, name)}
    chosen = [linear for linear in linears if linear.name not in kept and not _any(method.skip_modules, linear.name)]
    if not chosen and not problems:
        problems.append("no layer is left to quantize: skip_modules or the family keep every linear layer at 16 bits")
    problems += [
        f"{linear.name} is named by skip_modules and by force_modules"
        for linear in linears
        if _any(method.skip_modules, linear.name) and _any(method.force_modules, linear.name)
    ]
    problems += dict.fromkeys(reason for linear in chosen if (reason := method.refusal(linear)))
    if problems:
        raise CompatibilityError("\n".join(problems), where="quantize")
    return chosen


def _any(patterns: list[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def notes_on_experts(structure: Structure, specs: Mapping[str, OutputSpec], method: Method) -> tuple[str, ...]:
    """A note on experts that stay at 16 bits, if any do: they are most of a mixture's weights.

    Args:
        structure: the model's.
        specs: what the method will yield.
        method: the method.
    """
    kept = [
        name
        for name, spec in specs.items()
        if structure.in_blocks(name) and ".experts." in name and isinstance(spec, TensorSpec) and len(spec.shape) > 1
    ]
    if not kept:
        return ()
    reason = ": bitsandbytes quantizes no experts" if isinstance(method, RoundingMethod) and not method.experts else ""
    return (f"{len(kept)} tensors of experts stay at 16 bits{reason}",)
