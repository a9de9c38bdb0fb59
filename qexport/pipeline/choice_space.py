"""What the method `mixed` may choose from for each unit of layers, in the layouts that the recipe asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Final

from qexport.amounts import counted
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.joined import joined_modules
from qexport.architectures.structure import LinearSpec
from qexport.errors import CompatibilityError, InputError, QexportError, listed
from qexport.export import ExportSettings
from qexport.export.layouts import Layout, make_layouts
from qexport.formats import GptqFormat, Outputs
from qexport.quantizing.mixed import Mixed
from qexport.quantizing.selection import select
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantizedSpec, OutputSpec

_UNQUANTIZED: Final = 16


@dataclass(frozen=True, order=True)
class Option:
    """How a layer may be stored.

    Attributes:
        bits: 16 for an unquantized layer.
        group_size: -1 for a whole row, and for an unquantized layer.
    """

    bits: int
    group_size: int

    @property
    def unquantized(self) -> bool:
        """Whether the layer stays at 16 bits."""
        return self.bits == _UNQUANTIZED

    def __str__(self) -> str:
        if self.unquantized:
            return "16 bits"
        return f"{self.bits} bits in {'rows' if self.group_size == -1 else f'groups of {self.group_size}'}"


@dataclass(frozen=True)
class ChoiceSpace:
    """What may be chosen for each unit of layers.

    Attributes:
        method: the recipe's.
        checkpoint: the merged model.
        common: what every layer of the model is stored as, unless the choice says otherwise.
        units: the layers of each; those that vLLM joins, the experts of a block, or one alone.
        options: of each unit.
        refused: why other options are left out.
    """

    method: Mixed
    checkpoint: Checkpoint
    common: Outputs
    units: tuple[tuple[LinearSpec, ...], ...]
    options: tuple[tuple[Option, ...], ...]
    refused: Mapping[Option, str]

    @property
    def offered(self) -> list[Option]:
        """All options that some unit has."""
        return sorted({option for options in self.options for option in options})

    @property
    def base(self) -> list[Option]:
        """An option for each unit, before anything is measured: the first."""
        return [options[0] for options in self.options]

    def chosen(self, indices: Sequence[int]) -> list[Option]:
        """The option of each unit, from its index among the unit's options."""
        return [options[index] for options, index in zip(self.options, indices, strict=True)]

    def recorded(self, layers: Iterable[LayerRecord]) -> list[Option]:
        """The option of each unit in a finished artifact.

        Args:
            layers: its quantized layers.

        Raises:
            InputError: one is quantized as nothing that is offered.
        """
        own, found = {layer.name: (layer.bits, layer.group_size) for layer in layers}, list[Option]()
        for unit, options in zip(self.units, self.options, strict=True):
            first = unit[0]
            stored = own.get(first.name, (_UNQUANTIZED, -1))
            fitting = [
                option
                for option in options
                if stored == (astuple(option) if option.unquantized else _bits_and_group(first, option))
            ]
            if not fitting:
                raise InputError(
                    "a layer of the manifest has bits or groups that the recipe does not offer",
                    where=f"layers: {first.name}, {stored[0]} bits, groups of {stored[1]}",
                    mend="fetch the artifact again",
                )
            found.append(fitting[0])
        return found

    def counted(self, indices: Sequence[int]) -> str:
        """How many layers have which option, in words."""
        counts = Counter[Option]()
        for unit, option in zip(self.units, self.chosen(indices), strict=True):
            counts[option] += len(unit)
        return ", ".join(f"{counted(count, 'layer')} at {option}" for option, count in sorted(counts.items()))

    def outputs(self, chosen: Sequence[Option]) -> Outputs:
        """What the pass will yield with an option for each unit."""
        specs = dict(self.common.specs)
        weights = Counter[Option]()
        for unit, option in zip(self.units, chosen, strict=True):
            for linear in unit:
                specs[f"{linear.name}.weight"] = self._spec(linear, option)
                weights[option] += linear.out_features * linear.in_features
        quantized = {option: count for option, count in weights.items() if not option.unquantized}
        own = self.common.format
        assert isinstance(own, GptqFormat)
        if quantized:
            most = max(quantized, key=lambda option: (quantized[option], option))
            others = tuple(sorted({option.bits for option in quantized} - {most.bits}))
            own = replace(own, bits=most.bits, group_size=most.group_size, other_bits=others)
        return Outputs(own, specs, self.common.notes)

    def _spec(self, linear: LinearSpec, option: Option) -> OutputSpec:
        if option.unquantized:
            return self.checkpoint.weights.specs()[f"{linear.name}.weight"]
        return _grid(linear, option, sym=self.method.sym)

    def stored(self, layout: Layout) -> list[list[int]]:
        """Bytes of each unit with each of its options, in a layout."""
        encoding = layout.weights.encoding

        def total(unit: Sequence[LinearSpec], option: Option) -> int:
            names = ((f"{linear.name}.weight", self._spec(linear, option)) for linear in unit)
            return sum(each.nbytes for name, spec in names for each in encoding.specs(name, spec).values())

        return [
            [total(unit, option) for option in options] for unit, options in zip(self.units, self.options, strict=True)
        ]

    def beside(self, layout: Layout) -> int:
        """Bytes of a layout's tensors that are not chosen, as planned with the first option of each unit."""
        return layout.weights.total_bytes + layout.weights.shared_bytes - sum(sizes[0] for sizes in self.stored(layout))

    def lines(self) -> list[str]:
        """What may be chosen, and what is left out; for the plan."""
        groups = sorted({option.group_size for option in self.offered if not option.unquantized})
        bits = ", ".join(map(str, sorted({option.bits for option in self.offered})))
        sizes = ", ".join("whole rows" if group == -1 else str(group) for group in groups)
        return [
            f"each of {counted(len(self.units), 'unit')} of layers gets one of {bits} bits in groups of {sizes} in the "
            "run: plan --measure shows the choice; sizes, time and memory are those of one attempt, the smallest",
            *(f"not offered: {what}, since {reason}" for what, reason in self._left_out.items()),
        ]

    @property
    def _left_out(self) -> dict[str, str]:
        """What is not offered, with the reason; groups count together where no size of them is offered."""
        bits = {option.bits for option in self.offered}
        found: dict[str, str] = {}
        for option, reason in self.refused.items():
            found.setdefault(str(option) if option.bits in bits else f"{option.bits} bits", reason)
        return found


def _grid(linear: LinearSpec, option: Option, *, sym: bool) -> GroupQuantizedSpec:
    return GroupQuantizedSpec(
        linear.out_features, linear.in_features, *_bits_and_group(linear, option), sym, desc_act=False
    )


def _bits_and_group(linear: LinearSpec, option: Option) -> tuple[int, int]:
    """Bits and group size of a quantized layer, as its record has them."""
    return option.bits, linear.in_features if option.group_size == -1 else option.group_size


def choice_space(method: Mixed, checkpoint: Checkpoint, exports: Sequence[ExportSettings]) -> ChoiceSpace:
    """What the layers may be. Every layout is asked, with trial plans of all layers alike and of half of them.

    Raises:
        CompatibilityError: the layouts carry no option, or one alone.
    """
    structure = checkpoint.architecture.structure
    common = method.plan(checkpoint)
    free = _free(method, checkpoint)
    units = _units(free)
    offered = [Option(bits, group) for bits in method.bits if bits < _UNQUANTIZED for group in method.group_sizes]
    if _UNQUANTIZED in method.bits:
        offered.append(Option(_UNQUANTIZED, -1))
    options = tuple(tuple(option for option in offered if _divides(unit, option)) for unit in units)
    ragged = [unit for unit, own in zip(units, options, strict=True) if not own]
    if ragged or all(option.unquantized for own in options for option in own):
        linear = (ragged or units)[0][0]
        raise CompatibilityError(
            f"no group size of {method.group_sizes} divides the {linear.in_features} inputs of {linear.name}",
            where="quantize.group_sizes",
            mend="add one that does, or -1 for whole rows",
        )
    space = ChoiceSpace(method, checkpoint, common, units, options, {})

    def refusal(chosen: Sequence[Option]) -> QexportError | None:
        try:
            make_layouts(exports, space.outputs(chosen), structure, checkpoint)
        except QexportError as error:
            return error
        return None

    return _offered(space, offered, refusal)


def _offered(
    space: ChoiceSpace, offered: Sequence[Option], refusal: Callable[[Sequence[Option]], QexportError | None]
) -> ChoiceSpace:
    """The space without the options that the layouts refuse."""
    base, refused, accepted = None, dict[Option, QexportError](), list[Option]()
    for option in offered:
        if option.unquantized and base is None:
            break
        trial = _trial(space, option, base)
        if (error := refusal(trial)) is not None:
            refused[option] = error
            continue
        accepted.append(option)
        base = base or option
    if len(accepted) < 2:
        only = f": only {accepted[0]}" if accepted else ""
        raise CompatibilityError(
            f"the layouts leave no choice of bits and groups{only}",
            where=listed([f"{option}: {_reason(error)}" for option, error in refused.items()]),
            mend="use method gptq, other bits or group_sizes, or leave the layout out",
        )
    options = tuple(tuple(option for option in own if option in accepted) for own in space.options)
    options = tuple(own or (Option(_UNQUANTIZED, -1),) for own in options)
    return replace(space, options=options, refused={option: _reason(error) for option, error in refused.items()})


def _reason(error: QexportError) -> str:
    """What is wrong in the first place."""
    first = error.where.partition("\n")[0] if error.where else ""
    return f"{error.what} ({first})" if first else error.what


def _trial(space: ChoiceSpace, option: Option, base: Option | None) -> list[Option]:
    """The option for all units that can take it; beside another one, for those in every second block."""
    blocks = space.checkpoint.architecture.structure.blocks
    number = {linear.name: index for index, block in enumerate(blocks) for linear in _in(space, block)}
    chosen = []
    for index, (unit, options) in enumerate(zip(space.units, space.options, strict=True)):
        place = number[unit[0].name] if len(blocks) > 1 else index
        wanted = option if base is None or place % 2 else base
        chosen.append(wanted if wanted in options else options[0])
    return chosen


def _in(space: ChoiceSpace, block: str) -> tuple[LinearSpec, ...]:
    return space.checkpoint.architecture.structure.linears[block]


def _divides(unit: Sequence[LinearSpec], option: Option) -> bool:
    return option.group_size == -1 or all(linear.in_features % option.group_size == 0 for linear in unit)


def _free(method: Mixed, checkpoint: Checkpoint) -> dict[str, LinearSpec]:
    """The layers that take part: those that GPTQ would quantize, but for those that an override names."""
    structure = checkpoint.architecture.structure
    quantized = select(structure, method.gptq)
    linears = {linear.name: linear for linear in structure.block_linears if linear.name in quantized}
    return {name: linear for name, linear in linears.items() if not method.overridden(name)}


def _units(linears: Mapping[str, LinearSpec]) -> tuple[tuple[LinearSpec, ...], ...]:
    """The layers that must be quantized alike, in the order of the first of them."""
    group_of = {name: group[0] for group in joined_modules(dict.fromkeys(linears)) for name in group}
    found: dict[str, list[LinearSpec]] = {}
    for name, linear in linears.items():
        key = name.partition(".experts.")[0] if linear.expert else group_of.get(name, name)
        found.setdefault(key, []).append(linear)
    return tuple(map(tuple, found.values()))
