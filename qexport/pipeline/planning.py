"""What a run would do, determined before any weight of the base is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from qexport.amounts import counted, size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure
from qexport.artifact.baseline import BaselineRecord
from qexport.errors import CompatibilityError
from qexport.export.layouts import Layout, make_layouts
from qexport.formats import Outputs
from qexport.gates import Bounds
from qexport.hidden_packages import hidden
from qexport.loading import LoadSettings
from qexport.loading.adapter_folder import AdapterFolder, combined_origin, locate_adapter, locate_adapters
from qexport.loading.adapter_tokenizer import choose_tokenizer
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge, merge_several
from qexport.pipeline.adapter_survival import Protected, SampledSurvival, protect, refuse_same_grid, sampled_survival
from qexport.pipeline.baseline import read_baseline
from qexport.pipeline.choice_space import ChoiceSpace, Option, choice_space
from qexport.pipeline.expectations import Expected, expect
from qexport.pipeline.layer_types import LayerType, layer_types, type_lines
from qexport.pipeline.made_choice import MadeChoice
from qexport.pipeline.runtimes import (
    check_runtimes,
    refuse_full_context,
    refuse_homeless,
    refuse_only_endpoints,
    refuse_unmeasured_speed,
)
from qexport.pipeline.texts import check_small_files, read_evaluation, refuse_long_windows
from qexport.progress import Notice, ProgressCallback, silent
from qexport.quantizing.method import Method
from qexport.quantizing.mixed import Mixed
from qexport.recipe import Recipe
from qexport.verifying.tasks.planned import PlannedTask, planned_tasks

_FILES_SHOWN: Final = 2


def load_merged(load: LoadSettings, merging: MergeSettings, *, progress: ProgressCallback) -> Merged:
    """The merged model. Only headers of the base have been read."""
    checkpoint, adapter = load_checkpoint(load, progress=progress), locate_adapter(load, progress=progress)
    rows = checkpoint.architecture.structure.vocab_size
    if load.adapters:
        return _combined(checkpoint, locate_adapters(load, progress=progress), merging, progress)
    if adapter is None:
        return merge(checkpoint, None, merging, progress=progress)
    merged = merge(checkpoint, adapter.path, merging, adapter_origin=adapter.origin, progress=progress)
    return _with_tokenizer(merged, adapter, rows, progress)


def _combined(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[AdapterFolder, float]],
    merging: MergeSettings,
    progress: ProgressCallback,
) -> Merged:
    """Several adapters merged as one. They have one tokenizer, the base's."""
    folders = [(adapter.path, weight) for adapter, weight in adapters]
    merged = merge_several(checkpoint, folders, merging, origin=combined_origin(adapters), progress=progress)
    rows = checkpoint.architecture.structure.vocab_size
    for adapter, _ in adapters:
        if choose_tokenizer(checkpoint, adapter.files, set(), rows_before=rows).files is not checkpoint.files:
            raise CompatibilityError(
                f"the adapter {adapter.path.name} cannot be combined with others: its tokenizer adds tokens",
                where="load.adapters",
                mend="merge this adapter alone, save the model, and merge the others into it",
            )
    return merged


def _with_tokenizer(merged: Merged, adapter: AdapterFolder, rows_before: int, progress: ProgressCallback) -> Merged:
    described = merged.adapter
    assert described is not None
    chosen = choose_tokenizer(merged.checkpoint, adapter.files, set(described.tokens), rows_before=rows_before)
    for note in chosen.notes:
        progress(Notice(note))
    described = replace(described, notes=(*described.notes, *chosen.notes))
    if chosen.files is merged.checkpoint.files:
        return replace(merged, adapter=described)
    return Merged(chosen.of(merged.checkpoint), chosen.of(merged.unrounded), described, chosen.of(merged.base))


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        recipe: the recipe.
        protected: the recipe's method, without the layers that are protected from it, and what it would yield.
        merged: the merged model; its headers and the adapter have been read.
        structure: the model's parts.
        layouts: what would be written.
        expected: what it would take of memory, time and disk.
        space: what the method `mixed` chooses from; None for other methods. Until it has chosen, outputs and layouts
            have its first option for each layer.
        choice: what it has chosen, once that is known.
    """

    recipe: Recipe
    protected: Protected
    merged: Merged
    structure: Structure
    layouts: tuple[Layout, ...]
    expected: Expected
    space: ChoiceSpace | None = None
    choice: MadeChoice | None = None

    def choosing(self, made: MadeChoice) -> Plan:
        """The plan with a choice from `space`."""
        return replace(self.with_options(made.options, made.notes), choice=made)

    def with_options(self, options: Sequence[Option], notes: Sequence[str]) -> Plan:
        """The plan with an option for each unit of layers.

        Args:
            options: for each of `space`.
            notes: for report and manifest.
        """
        assert self.space is not None
        outputs = self.space.outputs(options)
        layouts = make_layouts(self.recipe.export, outputs, self.structure, self.merged.checkpoint)
        expected = expect(self.recipe, self.merged, outputs, _stored(layouts))
        protected = Protected(self.method, outputs, tuple(notes))
        return replace(self, protected=protected, layouts=layouts, expected=expected)

    @property
    def method(self) -> Method:
        """What quantizes."""
        return self.protected.method

    @property
    def outputs(self) -> Outputs:
        """What quantizing would yield."""
        return self.protected.outputs

    @property
    def distinct(self) -> list[list[Layout]]:
        """The layouts, grouped by those that share the files of their weights."""
        return _distinct(self.layouts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk; shared ones count once."""
        return _stored(self.layouts)

    @property
    def tasks(self) -> list[PlannedTask]:
        """The tasks that both models would answer, with their power."""
        settings = self.recipe.verify
        return [] if settings is None or settings.tasks is None else planned_tasks(settings.tasks)

    @cached_property
    def types(self) -> list[LayerType]:
        """What will be quantized and what will stay unquantized, by type of layer."""
        return layer_types(self.outputs, self.structure)

    @cached_property
    def survival(self) -> SampledSurvival | None:
        """What rounding leaves of the adapter. It reads some weights of the base; a run does not ask for it."""
        return sampled_survival(self.method, self.merged, self.outputs)

    @cached_property
    def files(self) -> dict[str, Mapping[str, int]]:
        """Bytes of each file, by layout; see `Layout.files`."""
        return {layout.name: layout.files(self.merged.checkpoint) for layout in self.layouts}

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
            "base_read_as": self.merged.checkpoint.origin.read_as,
            "adapter": adapter.origin.name if adapter else None,
            "changed_tensors": len(adapter.changed) if adapter else 0,
            "adapter_survival": self.survival.as_dict() if self.survival else None,
            "notes": [*self._notes(), *self._survival_notes()],
            "blocks": len(self.structure.blocks),
            "parameters": self.layouts[0].weights.parameters,
            "quantized_layers": quantized,
            "dense_tensors": len(self.outputs.specs) - quantized,
            "types": [each.as_dict() for each in self.types],
            "layouts": {layout.name: layout.weights.total_bytes for layout in self.layouts},
            "files": {name: dict(files) for name, files in self.files.items()},
            "readers": {layout.name: list(layout.readers) for layout in self.layouts},
            "degrees": {
                layout.name: {name: list(each) for name, each in layout.degrees.items()} for layout in self.layouts
            },
            "artifact_bytes": self.total_bytes,
            "choice": self.choice.as_dict() if self.choice else None,
            "tasks": [task.as_dict() for task in self.tasks],
            "baseline": None if (release := self.baseline) is None else release.model_dump(mode="json"),
            "expected": self.expected.as_dict(),
        }

    def short_lines(self) -> list[str]:
        """The plan in a few lines, with which a run begins."""
        adapter = self.merged.adapter
        quantized = len(self.outputs.quantized)
        layouts = ", ".join(f"{each.name} {size(each.weights.total_bytes, decimals=1)}" for each in self.layouts)
        shared = f" (on disk {size(self.total_bytes, decimals=1)})" if len(self.layouts) > 1 else ""
        parameters, read_as = self.layouts[0].weights.parameters, self.merged.checkpoint.origin.read_as
        return [
            f"base      {self.merged.checkpoint.origin.name}, {len(self.structure.blocks)} blocks, "
            f"{parameters / 1e6:,.1f}M parameters{f'; {read_as}' if read_as else ''}",
            f"adapter   {f'{adapter.origin.name}, changes {len(adapter.changed)} tensors' if adapter else 'none'}",
            f"quantize  {quantized} layers with {self.recipe.quantize.title}; "
            f"{len(self.outputs.specs) - quantized} tensors stay unquantized",
            f"export    {layouts}{shared}",
            f"expected  {self.expected.line()}",
        ]

    def lines(self) -> list[str]:
        """The whole plan as lines for the terminal."""
        *head, export, expected = self.short_lines()
        return [
            *head,
            *type_lines(self.types),
            *(self.choice.lines() if self.choice else ()),
            *([f"survives  {self.survival.line()}"] if self.survival else []),
            export,
            *(f"files     {_labelled(self, name)}{_listed(files)}" for name, files in self.files.items()),
            *(f"readers   {_labelled(self, each.name)}{_read_by(each)}" for each in self.layouts),
            expected,
            *(f"task      {task.line()}" for task in self.tasks),
            *_baseline_lines(self.baseline),
            *(f"note      {note}" for note in [*self._notes(), *self._survival_notes()]),
        ]

    def _notes(self) -> list[str]:
        adapter = self.merged.adapter
        return [
            *(adapter.notes if adapter else ()),
            *self.outputs.notes,
            *(self.space.lines() if self.space and not self.protected.notes else ()),
            *(() if self.choice else self.protected.notes),
            *self._layout_notes(),
        ]

    def _survival_notes(self) -> list[str]:
        return self.survival.notes(self.recipe.merge.dtype) if self.survival else []

    def _layout_notes(self) -> list[str]:
        several = len(self.layouts) > 1
        return [f"{layout.name}: {note}" if several else note for layout in self.layouts for note in layout.notes]


def _baseline_lines(release: BaselineRecord | None) -> list[str]:
    if release is None:
        return []
    drift = f"mean KL divergence {release.mean_kl:.4g} nats"
    return [f"baseline  {release.name}, {release.method}, {drift}; at most {release.margin:.0%} further"]


def _labelled(planned: Plan, layout: str) -> str:
    return f"{layout}: " if len(planned.layouts) > 1 else ""


def _listed(files: Mapping[str, int]) -> str:
    """The files of a layout, the largest first; small ones are counted."""
    shown = sorted(files, key=lambda name: -files[name])[:_FILES_SHOWN]
    words = [f"{name} {size(files[name], decimals=1)}" for name in shown]
    if others := [count for name, count in files.items() if name not in shown]:
        words.append(f"{counted(len(others), 'smaller file')} {size(sum(others), decimals=1)}")
    return f"{', '.join(words)}; {size(sum(files.values()), decimals=1)} without manifest and report"


def _read_by(layout: Layout) -> str:
    """Who can load a layout, with the tensor-parallel degrees of servers."""
    words = [
        f"{name} (tensor-parallel {', '.join(map(str, layout.degrees[name]))})" if name in layout.degrees else name
        for name in layout.readers
    ]
    return ", ".join([*words, "qexport.load"])


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
        RecipeError: there are tasks, and lm-evaluation-harness is missing; or a gate can never be decided, on this text
            or without a runtime.
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
    space, recipe = None, _with_gate(recipe)
    if isinstance(recipe.quantize, Mixed):
        space = choice_space(recipe.quantize, merged.checkpoint, recipe.export)
        protected = Protected(recipe.quantize, space.outputs(space.base))
    else:
        outputs = recipe.quantize.plan(merged.checkpoint)
        refuse_same_grid(recipe.merge, recipe.quantize, merged, outputs)
        protected = protect(recipe.quantize, merged, outputs)
    outputs = protected.outputs
    layouts = make_layouts(recipe.export, outputs, structure, merged.checkpoint)
    if recipe.verify is not None:
        refuse_unmeasured_speed(recipe.verify, _with_codes(layouts, outputs))
    expected = expect(recipe, merged, outputs, _stored(layouts))
    if recipe.max_memory is not None and find_device("auto").type == "cpu":
        expected.refuse_beyond(recipe.max_memory)
    return Plan(recipe, protected, merged, structure, layouts, expected, space)


def _with_gate(recipe: Recipe) -> Recipe:
    """The recipe with the target of `mixed` as a gate, if it has none of its own on the same figure."""
    method, verify = recipe.quantize, recipe.verify
    target = method.target.mean_kl if isinstance(method, Mixed) else None
    if target is None or verify is None or "mean_kl" in verify.gates:
        return recipe
    gates = {**verify.gates, "mean_kl": Bounds(at_most=target)}
    return recipe.model_copy(update={"verify": verify.model_copy(update={"gates": gates})})


def _with_codes(layouts: Sequence[Layout], outputs: Outputs) -> list[str]:
    """The layouts whose folders hold quantized weights and no graph."""
    quantized = {"gguf"} if outputs.quantized else set[str]()
    quantized |= {layout.name for layout in layouts if layout.quantization is not None}
    return [layout.name for layout in layouts if layout.name in quantized - {"onnx"}]


def _stored(layouts: Sequence[Layout]) -> int:
    """Bytes of all tensors on disk."""
    return sum(group[0].weights.total_bytes for group in _distinct(layouts))


def _check_windows(recipe: Recipe, structure: Structure) -> None:
    lengths: dict[str, int] = {}
    if (calibration := recipe.quantize.calibration_settings) is not None:
        lengths["quantize.calibration.sequence_length"] = calibration.sequence_length
    if recipe.verify is not None:
        lengths["verify.sequence_length"] = recipe.verify.sequence_length
    refuse_long_windows(lengths, structure)
