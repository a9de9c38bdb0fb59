"""How the tensors of a checkpoint's files become the parameters of a model in memory.

Files keep the names that servers read, which are those that transformers' `save_pretrained` writes. In memory some
families have other names (GPT-NeoX's head), and the experts of a mixture are together in one parameter. transformers
translates with an internal API (`transformers.core_model_loading`, 5.23), which only this file uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from qexport.errors import CompatibilityError


@dataclass(frozen=True)
class Part:
    """Where a tensor of the files is in the model.

    Attributes:
        parameter: the path of the parameter or buffer in the model.
        shape: of the tensor in the files.
        expert: for the matrix of one expert, its index in a parameter [experts, rows, in]; None where the tensor is
            the whole parameter.
        start: for the matrix of one expert, its first row there.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0

    def of(self, parameter: Tensor) -> Tensor:
        """The part as a view of the parameter."""
        return parameter if self.expert is None else parameter[self.expert, self.start : self.start + self.shape[0]]


@dataclass(frozen=True)
class Naming:
    """The names in the files and in the model.

    Attributes:
        parts: every tensor of the files, in the model's order, without the copies of tied weights.
        tied: the names of the copies in files, with the name of the weight that each is tied to.
        files: the name in files of each parameter that is one tensor there, by its path in the model.
    """

    parts: Mapping[str, Part]
    tied: Mapping[str, str]
    files: Mapping[str, str] = field(repr=False)

    def module(self, path: str) -> str:
        """The name in files of a module that has a weight."""
        return self.files[f"{path}.weight"].removesuffix(".weight")


def name_parameters(model: PreTrainedModel) -> Naming:
    """The names that the model's tensors have in files.

    Raises:
        CompatibilityError: transformers reshapes weights while it loads them, in a way that qexport does not know.
    """
    translation = _Translation(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    copies: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found = [(name, part) for path, shape in shapes.items() for name, part in translation.parts(path, shape)]
    files = {part.parameter: name for name, part in found if part.expert is None}
    if len({name for name, _ in found}) < len(found):
        raise translation.refusal("gives two parameters one name in the files")
    parts = {name: part for name, part in found if part.parameter not in copies}
    return Naming(parts, {files[copy]: files[original] for copy, original in copies.items()}, files)


class _Translation:
    """transformers' table of renamings and conversions for one model, read in both directions."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model_type = model.config.model_type
        # Prefixes are changed only where a checkpoint needs it, and never on saving: `revert_weight_conversion`.
        table = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, PrefixChange)
        ]
        self._renamings, self._converters = _split(table)
        self._back_renamings, self._back_converters = _split([entry.reverse_transform() for entry in reversed(table)])

    def parts(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Part]]:
        """The tensors of the files that make up a parameter, by name."""
        fused = next((entry for entry in self._converters if _converts(entry, path, self._back_converters)), None)
        if fused is None:
            name, _ = rename_source_key(path, self._back_renamings, [])
            yield self._checked(name, Part(path, shape), None)
            return
        if not _stacks_experts(fused) or len(shape) != 3 or shape[1] % len(fused.source_patterns):
            operations = ", ".join(type(operation).__name__ for operation in fused.operations)
            raise self.refusal(f"makes {path} with {operations}")
        rows = shape[1] // len(fused.source_patterns)
        for expert in range(shape[0]):
            for index, pattern in enumerate(fused.source_patterns):
                stored = path.replace(fused.target_patterns[0], pattern.replace("*", str(expert)), 1)
                name, _ = rename_source_key(stored, self._back_renamings, [])
                yield self._checked(name, Part(path, (rows, shape[2]), expert, index * rows), pattern)

    def refusal(self, what: str) -> CompatibilityError:
        """The error for a table that qexport does not understand."""
        return CompatibilityError(
            f"transformers {what} while it loads a model of type {self._model_type}",
            where="config.json: model_type",
            mend="this family is not supported yet",
        )

    def _checked(self, name: str, part: Part, pattern: str | None) -> tuple[str, Part]:
        """Checks that transformers maps the name back to the parameter when it loads."""
        if rename_source_key(name, self._renamings, self._converters) != (part.parameter, pattern):
            raise self.refusal(f"would not load {name} as {part.parameter}")
        return name, part


def _split(table: Sequence[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in table if isinstance(entry, WeightConverter)]


def _converts(entry: WeightConverter, path: str, backwards: Sequence[WeightConverter]) -> bool:
    """Whether this entry makes the parameter: the first one that matches it in the reverse direction does."""
    _, pattern = rename_source_key(path, [], list(backwards))
    return pattern in entry.target_patterns


def _stacks_experts(entry: WeightConverter) -> bool:
    """Whether the entry stacks experts' matrices, several kinds one below the other: [experts, kinds * rows, in]."""
    stacks = [(MergeModulelist, 0)] if len(entry.source_patterns) == 1 else [(MergeModulelist, 0), (Concatenate, 1)]
    found = [(type(operation), getattr(operation, "dim", None)) for operation in entry.operations]
    return found == stacks and len(entry.target_patterns) == 1 and all("*" in name for name in entry.source_patterns)
