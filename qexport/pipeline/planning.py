"""What a run would do, determined before any weight of the base is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qexport.amounts import size
from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure
from qexport.artifact.baseline import BaselineRecord
from qexport.export.layouts import Layout, make_layout
from qexport.formats import Outputs
from qexport.hidden_packages import hidden
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint, locate_adapter
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.pipeline.baseline import read_baseline
from qexport.pipeline.expectations import Expected, expect
from qexport.pipeline.runtimes import check_runtimes, refuse_full_context, refuse_homeless, refuse_only_endpoints
from qexport.pipeline.texts import check_small_files, read_evaluation, refuse_long_windows
from qexport.progress import ProgressCallback, silent
from qexport.recipe import Recipe
from qexport.verifying.tasks.planned import PlannedTask, planned_tasks


def load_merged(load: LoadSettings, merging: MergeSettings, *, progress: ProgressCallback) -> Merged:
    """The merged model. Only headers of the base have been read."""
    checkpoint, adapter = load_checkpoint(load, progress=progress), locate_adapter(load, progress=progress)
    return merge(
        checkpoint,
        adapter.path if adapter else None,
        merging,
        adapter_origin=adapter.origin if adapter else None,
        progress=progress,
    )


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        recipe: the recipe.
        merged: the merged model; its headers and the adapter have been read.
        structure: the model's parts.
        outputs: what quantizing would yield.
        layouts: what would be written.
        expected: what it would take of memory, time and disk.
    """

    recipe: Recipe
    merged: Merged
    structure: Structure
    outputs: Outputs
    layouts: tuple[Layout, ...]
    expected: Expected

    @property
    def distinct(self) -> list[list[Layout]]:
        """The layouts, grouped by those that share the files of their weights."""
        return _distinct(self.layouts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk; shared ones count once."""
        return sum(group[0].weights.total_bytes for group in self.distinct)

    @property
    def tasks(self) -> list[PlannedTask]:
        """The tasks that both models would answer, with their power."""
        settings = self.recipe.verify
        return [] if settings is None or settings.tasks is None else planned_tasks(settings.tasks)

    @cached_property
    def baseline(self) -> BaselineRecord | None:
        """The release that the artifact would be compared with."""
        found = None if self.recipe.verify is None else read_baseline(self.recipe.verify)
        return None if found is None else found.record

    def folder(self, output: Path, layout: Layout) -> Path:
        """The folder of a layout: the output itself, or its subfolder with the layout's name if there are several."""
        return output / layout.name if len(self.layouts) > 1 else output

    def as_dict(self) -> dict[str, Any]:
        """The plan's figures as JSON values."""
        adapter = self.merged.adapter
        quantized = len(self.outputs.quantized)
        return {
            "base": self.merged.checkpoint.origin.name,
            "adapter": adapter.origin.name if adapter else None,
            "changed_tensors": len(adapter.changed) if adapter else 0,
            "notes": [*(adapter.notes if adapter else ()), *self.outputs.notes, *self._layout_notes()],
            "blocks": len(self.structure.blocks),
            "parameters": self.layouts[0].weights.parameters,
            "quantized_layers": quantized,
            "dense_tensors": len(self.outputs.specs) - quantized,
            "layouts": {layout.name: layout.weights.total_bytes for layout in self.layouts},
            "artifact_bytes": self.total_bytes,
            "tasks": [task.as_dict() for task in self.tasks],
            "baseline": None if (release := self.baseline) is None else release.model_dump(mode="json"),
            "expected": self.expected.as_dict(),
        }

    def lines(self) -> list[str]:
        """The plan as lines for the terminal."""
        figures = self.as_dict()
        adapter = f"{figures['adapter']}, changes {figures['changed_tensors']} tensors"
        layouts = ", ".join(f"{name} {size(count, decimals=1)}" for name, count in figures["layouts"].items())
        shared = f" (on disk {size(self.total_bytes, decimals=1)})" if len(self.layouts) > 1 else ""
        return [
            f"base      {figures['base']}, {figures['blocks']} blocks, {figures['parameters'] / 1e6:,.1f}M parameters",
            f"adapter   {adapter if self.merged.adapter else 'none'}",
            f"quantize  {figures['quantized_layers']} layers with {self.recipe.quantize.title}; "
            f"{figures['dense_tensors']} tensors stay unquantized",
            f"export    {layouts}{shared}",
            f"expected  {self.expected.line()}",
            *(f"task      {task.line()}" for task in self.tasks),
            *_baseline_lines(self.baseline),
            *(f"note      {note}" for note in figures["notes"]),
        ]

    def _layout_notes(self) -> list[str]:
        several = len(self.layouts) > 1
        return [f"{layout.name}: {note}" if several else note for layout in self.layouts for note in layout.notes]


def _baseline_lines(release: BaselineRecord | None) -> list[str]:
    if release is None:
        return []
    drift = f"mean KL divergence {release.mean_kl:.4g} nats"
    return [f"baseline  {release.name}, {release.method}, {drift}; at most {release.margin:.0%} further"]


def _distinct(layouts: Sequence[Layout]) -> list[list[Layout]]:
    groups: list[list[Layout]] = []
    for layout in layouts:
        group = next((group for group in groups if group[0].weights.equal(layout.weights)), None)
        if group is None:
            groups.append([layout])
        else:
            group.append(layout)
    return groups


@hidden("kernels")
def plan(recipe: Recipe, *, texts: bool = False, progress: ProgressCallback = silent) -> Plan:
    """Checks a recipe against headers, configs and the adapter; checks the prompts and task files too.

    Args:
        recipe: the recipe.
        texts: whether to read what the artifact would be verified on, as a run does next.
        progress: is called with what a user should know.

    Raises:
        RecipeError: there are tasks, and lm-evaluation-harness is missing; or a gate can never be decided on the text.
        InputError: the base, the adapter, the prompts, a task file or a text cannot be used.
        CompatibilityError: method, layout and model do not fit together.
        ResourceError: the run needs more memory than `max_memory`, and would compute on a CPU.
    """
    if recipe.verify is not None:
        check_small_files(recipe.verify)
        check_runtimes(recipe.verify)
        refuse_only_endpoints(recipe.verify)
        refuse_homeless(recipe.verify, [each.layout for each in recipe.export])
    merged = load_merged(recipe.load, recipe.merge, progress=progress)
    structure = merged.checkpoint.architecture.structure
    _check_windows(recipe, structure)
    if recipe.verify is not None:
        refuse_full_context(recipe.verify, merged.checkpoint.config)
    if texts and recipe.verify is not None:
        read_evaluation(recipe.verify, open_tokenizer(merged.checkpoint), merged.checkpoint, progress=progress)
    outputs = recipe.quantize.plan(merged.checkpoint)
    layouts = tuple(make_layout(settings, outputs, structure, merged.checkpoint) for settings in recipe.export)
    stored = sum(group[0].weights.total_bytes for group in _distinct(layouts))
    expected = expect(recipe, merged, outputs, stored)
    if recipe.max_memory is not None and find_device("auto").type == "cpu":
        expected.refuse_beyond(recipe.max_memory)
    return Plan(recipe, merged, structure, outputs, layouts, expected)


def _check_windows(recipe: Recipe, structure: Structure) -> None:
    lengths: dict[str, int] = {}
    if (calibration := recipe.quantize.calibration_settings) is not None:
        lengths["quantize.calibration.sequence_length"] = calibration.sequence_length
    if recipe.verify is not None:
        lengths["verify.sequence_length"] = recipe.verify.sequence_length
    refuse_long_windows(lengths, structure)
