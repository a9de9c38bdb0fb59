"""What a run would do, found out before any weight of the base is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qexport.architectures.structure import Structure, describe
from qexport.export.safetensors_layout import SafetensorsLayout
from qexport.load.adapter import locate_adapter
from qexport.load.checkpoint import load_checkpoint
from qexport.merge.merging import Merged, merge
from qexport.progress import Reporter, silent
from qexport.quantize.gptq import output_specs
from qexport.recipe.model import Recipe
from qexport.tensors import GroupQuantizedSpec


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        recipe: the recipe.
        merged: the merged model; its headers and the adapter have been read.
        structure: the model's parts.
        layout: what would be written.
    """

    recipe: Recipe
    merged: Merged
    structure: Structure
    layout: SafetensorsLayout

    def as_dict(self) -> dict[str, Any]:
        """The plan's figures as JSON values."""
        adapter = self.merged.adapter
        quantized = sum(isinstance(spec, GroupQuantizedSpec) for spec in self.layout.plan.values())
        return {
            "base": self.merged.checkpoint.origin.name,
            "adapter": adapter.origin.name if adapter else None,
            "changed_tensors": len(adapter.changed) if adapter else 0,
            "notes": [*(adapter.notes if adapter else ()), *self.layout.notes],
            "blocks": len(self.structure.blocks),
            "parameters": self.layout.parameters,
            "quantized_layers": quantized,
            "dense_tensors": len(self.layout.plan) - quantized,
            "layout": self.recipe.export[0].layout,
            "artifact_bytes": self.layout.total_bytes,
        }

    def lines(self) -> list[str]:
        """The plan for a reader at the terminal."""
        figures, settings = self.as_dict(), self.recipe.quantize
        adapter = f"{figures['adapter']}, changes {figures['changed_tensors']} tensors"
        return [
            f"base      {figures['base']}, {figures['blocks']} blocks, {figures['parameters'] / 1e6:,.1f}M parameters",
            f"adapter   {adapter if self.merged.adapter else 'none'}",
            f"quantize  {figures['quantized_layers']} layers with {settings.method}, {settings.bits} bits, group_size "
            f"{settings.group_size}; {figures['dense_tensors']} tensors stay dense",
            f"export    {figures['layout']}, {figures['artifact_bytes'] / 1e6:,.1f} MB",
        ]


def plan(recipe: Recipe, *, report: Reporter = silent) -> Plan:
    """Checks everything that headers, configurations and the adapter can tell.

    Raises:
        InputError: the base or the adapter cannot be used.
        CompatibilityError: method, layout and model do not fit together.
    """
    checkpoint = load_checkpoint(recipe.load, report=report)
    adapter = locate_adapter(recipe.load, report=report)
    merged = merge(
        checkpoint,
        adapter.path if adapter else None,
        recipe.merge,
        adapter_origin=adapter.origin if adapter else None,
        report=report,
    )
    structure = describe(merged.checkpoint.config)
    specs = output_specs(merged.checkpoint, structure, recipe.quantize)
    return Plan(recipe, merged, structure, SafetensorsLayout(recipe.export[0], specs, structure))
