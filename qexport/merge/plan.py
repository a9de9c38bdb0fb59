"""The plan of a merge, and all reasons against it, found before a weight of the base is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qexport.architectures.families import family, matching
from qexport.errors import CompatibilityError, InputError, listed
from qexport.merge.adapter import MERGE_WITH_PEFT, Adapter
from qexport.merge.changes import Change, LowRank, Replace, ReplaceRows
from qexport.merge.stored import PREFIX
from qexport.merge.targets import BaseModel
from qexport.tensors.source import is_finite

_MAX_NAMED = 4
"""The most tensors with the same fault that a message names."""

_RESIZE = (
    "resize the base's embeddings as they were in training (resize_token_embeddings), save it and give it as load.base"
)


@dataclass
class MergePlan:
    """The changes to each tensor of the base, and the tensors that the adapter must have for them.

    Attributes:
        adapter: what is merged.
        base: what it is merged into.
        changes: the steps for each tensor of the base, in their order, by its path in the model (the matrix of an
            expert by its name in the files).
        expected: the shape of each tensor that the adapter must hold, by its key.
        integers: those of them that hold whole numbers, for example places in a matrix.
        incompatible: reasons why this adapter and this model must not be merged, each with what to do about it.
    """

    adapter: Adapter
    base: BaseModel
    changes: dict[str, list[Change]] = field(default_factory=dict)
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)
    incompatible: dict[str, str] = field(default_factory=dict)

    def factor(self, module: str, name: str, shape: tuple[int, ...]) -> str:
        """Requires the adapter's tensor `name` of a module, and returns its key."""
        return self.tensor(f"{PREFIX}{module}.{name}", shape)

    def tensor(self, key: str, shape: tuple[int, ...], *, integer: bool = False) -> str:
        """Requires a tensor of the adapter by its key, and returns the key; `integer`, if it holds whole numbers."""
        self.expected[key] = shape
        if integer:
            self.integers.add(key)
        return key

    def change(self, weight: str, change: Change) -> None:
        """Adds a step to the changes of a tensor of the base."""
        self.changes.setdefault(weight, []).append(change)

    def refuse_unmergeable(self, module: str) -> None:
        """Refuses a module that must not be adapted in the model's family."""
        reason = matching(family(self.base.structure.model_type).unmergeable, module)
        if reason:
            self.refuse(f"{module}: {reason}", "train the adapter without this module")

    def refuse(self, reason: str, mend: str) -> None:
        """Records why the adapter cannot be merged into this model, and what to do about it."""
        self.incompatible[reason] = mend

    def raise_refusals(self) -> None:
        """Raises everything that has been refused so far as one error.

        Raises:
            CompatibilityError: something has been refused.
        """
        if self.incompatible:
            raise CompatibilityError(
                f"the adapter {self.adapter.folder.name} cannot be merged into this model",
                where=listed(list(self.incompatible)),
                mend="; ".join(dict.fromkeys(self.incompatible.values())),
            )

    def checked_changes(self) -> Mapping[str, tuple[Change, ...]]:
        """The changes to the tensors of the checkpoint's files, after every check that headers allow.

        Raises:
            CompatibilityError: a module must not be adapted.
            InputError: the adapter's tensors are not those that its configuration requires for this base.
        """
        self._join_tied()
        self._check_experts()
        self.raise_refusals()
        self._check_tensors()
        if not self.changes:
            raise InputError(f"the adapter {self.adapter.folder.name} changes nothing", mend="remove load.adapter")
        return {self._file_name(path): tuple(steps) for path, steps in self.changes.items()}

    @property
    def parts_ends(self) -> bool:
        """Whether embedding and head are tied, and the adapter would change them differently."""
        if not self.base.structure.tied:
            return False
        embedding, head = (self.changes.get(f"{end}.weight", []) for end in (self.base.embedding, self.base.head))
        if not head:  # PEFT ties trained rows of the embedding to the head
            return not all(isinstance(change, ReplaceRows) for change in embedding)
        return len(embedding) != len(head) or not all(map(self._alike, embedding, head))

    def _alike(self, one: Change, other: Change) -> bool:
        match one, other:
            case (ReplaceRows(), ReplaceRows()):
                return one.indices == other.indices and self.equal(one.rows, other.rows)
            case (Replace(), Replace()):
                return self.equal(one.tensor, other.tensor)
            case (LowRank(transposed=True), LowRank(transposed=False)) if one.scaling == other.scaling:
                return self.equal(one.a, other.b, transposed=True) and self.equal(one.b, other.a, transposed=True)
        return False

    def _join_tied(self) -> None:
        """Takes equal changes of a tied embedding and head as one change of the embedding."""
        if self.base.structure.tied:
            assert not self.parts_ends
            self.changes.pop(f"{self.base.head}.weight", None)

    def _check_experts(self) -> None:
        for path in self.changes:
            if self._file_name(path) not in self.base.naming.parts:
                self.refuse(f"{path}: it holds all experts, and the files hold each separately", MERGE_WITH_PEFT)

    def _file_name(self, path: str) -> str:
        return self.base.naming.files.get(path, path)

    def equal(self, one: str, other: str, *, transposed: bool = False) -> bool:
        """Whether the adapter has two tensors, and they have the same values; `transposed`, if one is turned round."""
        if not {one, other} <= self.adapter.file.specs().keys():
            return False
        first, second = map(self.adapter.read, (one, other))
        return torch.equal(first.t() if transposed else first, second)

    def _check_tensors(self) -> None:
        specs, expected = self.adapter.file.specs(), self.expected
        misshapen = [key for key in expected if key in specs and specs[key].shape != expected[key]]
        problems = {
            "missing": [key for key in expected if key not in specs],
            "not targeted by its configuration": [key for key in specs if key not in expected],
            "of another shape": [f"{key} {list(specs[key].shape)}, not {list(expected[key])}" for key in misshapen],
            "not of floating point": [
                key for key, spec in specs.items() if not spec.dtype.is_floating_point and key not in self.integers
            ],
            "without their weight in the base": [
                name for name in self.changes if self._file_name(name) not in self.base.weights
            ],
        }
        lines = [f"{len(names)} tensors {fault}: {_some(names)}" for fault, names in problems.items() if names]
        if lines:
            raise InputError(
                f"the adapter {self.adapter.folder.name} does not fit the base",
                where=listed(lines),
                mend=_RESIZE if self._resized(misshapen) else "give the base that the adapter was trained on",
            )

    def _resized(self, misshapen: list[str]) -> bool:
        ends = (self.base.embedding, self.base.head)
        return bool(misshapen) and all(key.startswith(tuple(f"{PREFIX}{end}." for end in ends)) for key in misshapen)

    def check_finite(self) -> None:
        """Reads every tensor of the adapter once.

        Raises:
            InputError: some hold NaN or Inf; all of them are named.
        """
        broken = [key for key in self.adapter.file.specs() if not is_finite(self.adapter.file.read(key))]
        if broken:
            raise InputError(
                f"{len(broken)} tensors of the adapter {self.adapter.folder.name} hold NaN or Inf",
                where=listed(broken),
                mend="the training diverged; take an earlier checkpoint of the adapter",
            )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + rest
