"""Embedding and output head that one layout rounds to 8 bits, though they stay unquantized in the others."""

from __future__ import annotations

from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError
from qexport.export import GgufSettings, OnnxSettings
from qexport.formats import Outputs
from qexport.formats.gguf.blocks import BLOCK
from qexport.tensors import TensorSpec


def rounded_ends(settings: GgufSettings | OnnxSettings, outputs: Outputs, structure: Structure) -> frozenset[str]:
    """The names of the parameters that are rounded to Q8_0.

    Args:
        settings: the layout's.
        outputs: what the pass will yield.
        structure: of the model.

    Raises:
        CompatibilityError: the model has no output head of its own, or a parameter is quantized already or has rows
            that are no multiple of the block.
    """
    where = f"export: {settings.layout}"
    wanted = {structure.embedding: settings.token_embedding_type, structure.head: settings.output_tensor_type}
    found = frozenset(f"{module}.weight" for module, kind in wanted.items() if kind == "q8_0")
    for name in sorted(found):
        spec = outputs.specs.get(name)
        if spec is None:
            raise CompatibilityError(
                "the model has no output head of its own: it multiplies with the embedding",
                where=f"{where}: output_tensor_type",
                mend="set token_embedding_type: q8_0 instead",
            )
        if not isinstance(spec, TensorSpec) or spec.shape[-1] % BLOCK:
            raise CompatibilityError(
                f"{name} cannot be rounded to Q8_0: it is quantized, or its rows are no multiple of {BLOCK}",
                where=where,
                mend="leave out token_embedding_type or output_tensor_type",
            )
    return found


def rounding_note(rounded: frozenset[str]) -> list[str]:
    """What users should know of the rounded parameters; nothing if there are none."""
    return [f"rounded to Q8_0 in this layout, unlike in others: {', '.join(sorted(rounded))}"] if rounded else []
