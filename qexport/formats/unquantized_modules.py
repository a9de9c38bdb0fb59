"""The modules that a config lists as unquantized, for formats whose loaders quantize every other `Linear`."""

from __future__ import annotations

from qexport.architectures.structure import Structure
from qexport.formats.format import Specs
from qexport.tensors import QuantizedSpec, TensorSpec


def unquantized_modules(specs: Specs, structure: Structure) -> list[str]:
    """Every module whose matrix is unquantized, and the head: a loader may make a `Linear` of a router, for example."""
    unquantized = {
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if isinstance(spec, TensorSpec) and len(spec.shape) == 2 and name.endswith(".weight")
    }
    head = set() if isinstance(specs.get(f"{structure.head}.weight"), QuantizedSpec) else {structure.head}
    return sorted((unquantized | head) - {structure.embedding})
