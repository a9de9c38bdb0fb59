"""The linear layers as TGI holds them: joined where they share an input, and split between shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from qexport.export.tgi.families import OwnModel

Shape = tuple[int, int]
"""Outputs and inputs."""


@dataclass(frozen=True)
class ServedLinear:
    """One linear layer in the server.

    Attributes:
        modules: the module paths it is made of, in the model's order.
        shapes: outputs and inputs of each.
        row: split along the inputs between shards, else along the outputs.
        packed: one module that holds several linears.
    """

    modules: tuple[str, ...]
    shapes: tuple[Shape, ...]
    row: bool
    packed: bool

    @property
    def name(self) -> str:
        """All module paths, shortened."""
        first, *rest = self.modules
        return "+".join([first, *(module.rpartition(".")[2] for module in rest)])

    @property
    def shape(self) -> Shape:
        """Outputs and inputs of the whole."""
        return sum(out for out, _ in self.shapes), self.shapes[0][1]

    def sharded(self, degree: int) -> Shape | None:
        """Outputs and inputs on one of `degree` shards; None where they cannot be divided."""
        divided = [in_features if self.row else out_features for out_features, in_features in self.shapes]
        if any(count % degree for count in divided):
            return None
        out_features, in_features = self.shape
        return (out_features, in_features // degree) if self.row else (out_features // degree, in_features)


def served_linears(shapes: Mapping[str, Shape], model: OwnModel) -> list[ServedLinear]:
    """The linears of a model as TGI joins them.

    Args:
        shapes: outputs and inputs of each linear, by module path.
        model: the family's.
    """
    joined = {name: group for group in model.joined for name in group}
    keys = {module: (module.rpartition(".")[0], joined.get(_last(module), (_last(module),))) for module in shapes}
    ordered = sorted(shapes, key=lambda module: keys[module])
    return [_served(tuple(modules), shapes, model) for _, modules in groupby(ordered, key=lambda module: keys[module])]


def _served(modules: Iterable[str], shapes: Mapping[str, Shape], model: OwnModel) -> ServedLinear:
    order = {name: index for group in model.joined for index, name in enumerate(group)}
    modules = tuple(sorted(modules, key=lambda module: order.get(_last(module), 0)))
    last = _last(modules[0])
    return ServedLinear(modules, tuple(shapes[module] for module in modules), last in model.row, last in model.packed)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
