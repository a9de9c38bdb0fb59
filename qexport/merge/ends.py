"""The base with the embedding and the head that an adapter was trained with: resized, or no longer tied.

An adapter that adds tokens was trained on a base whose embedding and head had been resized. Such a base is put together
here lazily: the stored rows, and behind them those that the adapter's folder holds. The adapter is then merged into it
as into any other, and everything that is compared with the base has the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.families import family
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError, InputError, listed
from qexport.merge.adapter import Adapter
from qexport.merge.changes import Change, Replace, ReplaceRows
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.tensors.source import TensorSpec, WeightSource

_BEFORE = ("original_module.{}", "token_adapter.base_layer.{}", "base_layer.{}")
"""Where PEFT stores a whole tensor of an embedding or head as it was before the training."""

_STORED = (*_BEFORE, "{}")
"""The same, and where it stores a trained one."""


def with_vocabulary(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with as many tokens as the adapter was trained with; itself if it has them.

    Args:
        checkpoint: the base.
        adapter: headers have been read.

    Raises:
        InputError: the adapter's tensors have several numbers of rows, or it names a token far beyond the base's.
    """
    ends = _ends(checkpoint.architecture)
    rows = _rows(checkpoint.architecture.structure, ends, adapter)
    if rows is None or rows == checkpoint.architecture.structure.vocab_size:
        return checkpoint
    architecture = Architecture(_with_rows(checkpoint.architecture, rows))
    tensors = _resized(checkpoint, ends, adapter, rows)
    return replace(checkpoint, architecture=architecture, weights=_Ends(checkpoint.weights, tensors, adapter, {}))


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The base with a head of its own, of the embedding's values.

    Raises:
        CompatibilityError: the family always uses the embedding as its head.
    """
    old = checkpoint.architecture
    copies = old.naming.tied
    architecture = Architecture(_everywhere(old.config, "tie_word_embeddings", False))
    if family(old.structure.model_type).one_end or architecture.structure.tied:
        raise CompatibilityError(
            f"the adapter changes embedding and head differently, and servers of {old.structure.model_type} use one "
            "weight for both",
            where=f"{old.structure.embedding} and {old.structure.head}",
            mend="train the adapter with ensure_weight_tying=True, or without these two",
        )
    return replace(checkpoint, architecture=architecture, weights=_Ends(checkpoint.weights, {}, None, copies))


def refuse_unknown_rows(plan: MergePlan, base: Checkpoint) -> None:
    """Refuses an adapter that adds tokens without all their rows: whatever stood there in training is nowhere.

    Args:
        plan: of the merge into the base with the adapter's vocabulary.
        base: the base as it was given.

    Raises:
        InputError: rows are in neither the base nor the adapter, and are not trained ones.
    """
    was, now, ends = base.architecture.structure, plan.base.structure, (plan.base.embedding, plan.base.head)
    added = set(range(was.vocab_size, now.vocab_size))
    missing, specs = list[str](), plan.adapter.file.specs()
    for end in ends[:1] if now.tied else ends:
        for kind in plan.base.modules[end].tensors if added else ():
            sources = ends if was.tied else (end,)
            known = any(f"{PREFIX}{path}.{form.format(kind)}" in specs for path in sources for form in _BEFORE)
            if not known and (unknown := added - _replaced(plan.changes.get(f"{end}.{kind}", ()), added)):
                missing.append(f"{end}.{kind}: tokens {min(unknown)} to {max(unknown)}")
    if missing:
        saved = not any(f"{PREFIX}{end}.base_layer.weight" in specs for end in ends)
        raise InputError(
            f"the adapter {plan.adapter.folder.name} adds tokens to the base, and does not hold all their rows",
            where=listed(missing),
            mend=f"{_SAVE_AGAIN if saved else ''}give as load.base the base as it was resized for the training",
        )


def _replaced(changes: Iterable[Change], rows: set[int]) -> set[int]:
    """Those of the rows that changes set, whatever the base has there."""
    found = set[int]()
    for change in changes:
        if isinstance(change, Replace):
            return rows
        if isinstance(change, ReplaceRows):
            found.update(change.indices)
    return found


_SAVE_AGAIN = "save the adapter once more where it was trained, with save_embedding_layers=True, or "


def _ends(architecture: Architecture) -> dict[str, str]:
    """The paths of embedding and head in the model, with their names in the files."""
    model, naming = architecture.skeleton, architecture.naming
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = {module: path for path, module in model.named_modules()}
    return {paths[module]: naming.module(paths[module]) for module in modules}


def _rows(structure: Structure, ends: Mapping[str, str], adapter: Adapter) -> int | None:
    """The size of the vocabulary in training; None if the adapter says nothing of it."""
    specs, width = adapter.file.specs(), structure.parameters[f"{structure.embedding}.weight"][1:]
    keys = [f"{PREFIX}{path}.{form.format('weight')}" for path in ends for form in _STORED]
    found = {key: specs[key].shape[0] for key in keys if key in specs and specs[key].shape[1:] == width}
    if len(set(found.values())) > 1:
        raise InputError(
            f"the adapter {adapter.folder.name} has embeddings of several sizes",
            where=listed([f"{key}: {rows} tokens" for key, rows in found.items()]),
            mend="save it once more where it was trained",
        )
    if found:
        return next(iter(found.values()))
    named = trained_tokens(adapter.config)
    largest = max(named, default=-1)
    if largest - structure.vocab_size > len(named):  # then some added tokens are not among them
        raise InputError(
            f"the adapter {adapter.folder.name} trains token {largest}, and the base has {structure.vocab_size} tokens",
            where="adapter_config.json: trainable_token_indices",
            mend="give as load.base the base as it was resized for the training",
        )
    return largest + 1 if largest >= structure.vocab_size else None


def trained_tokens(config: Mapping[str, Any]) -> set[int]:
    """The tokens that an adapter_config.json names as trained one by one."""
    named = config.get("trainable_token_indices") or config.get("token_indices") or ()
    lists = named.values() if isinstance(named, Mapping) else [named]
    return {index for each in lists if isinstance(each, Sequence) for index in each if type(index) is int}


def _with_rows(architecture: Architecture, rows: int) -> dict[str, Any]:
    return _everywhere(architecture.config, "vocab_size", rows)


def _everywhere(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with another value, which families with several parts have in that of the text too."""
    changed = {**config, key: value}
    if isinstance(text := config.get("text_config"), Mapping):
        changed["text_config"] = {**text, key: value}
    return changed


@dataclass(frozen=True)
class _Tensor:
    """A tensor with another number of rows.

    Attributes:
        rows: how many.
        added: the adapter's tensor whose rows follow those of the base, from before the training where there is one;
            None if there is none.
    """

    rows: int
    added: str | None


def _resized(checkpoint: Checkpoint, ends: Mapping[str, str], adapter: Adapter, rows: int) -> dict[str, _Tensor]:
    structure, specs = checkpoint.architecture.structure, adapter.file.specs()
    tensors = dict[str, _Tensor]()
    for path, name in ends.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in structure.parameters:
                continue  # a tied head, or one without a bias
            paths = ends if structure.tied else (path,)
            keys = (f"{PREFIX}{each}.{form.format(kind)}" for form in _STORED for each in paths)
            tensors[f"{name}.{kind}"] = _Tensor(rows, next((key for key in keys if key in specs), None))
    return tensors


class _Ends:
    """A `WeightSource` with other numbers of rows, or with copies of tensors under further names."""

    def __init__(
        self,
        base: WeightSource,
        tensors: Mapping[str, _Tensor],
        adapter: Adapter | None,
        copies: Mapping[str, str],
    ) -> None:
        self._base, self._tensors, self._adapter, self._copies = base, tensors, adapter, copies

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, with its shape and dtype; copies come last, as a head does."""
        return dict(self._described())

    def _described(self) -> Iterator[tuple[str, TensorSpec]]:
        known = self._base.specs()
        for name, spec in known.items():
            changed = self._tensors.get(name)
            yield name, spec if changed is None else replace(spec, shape=(changed.rows, *spec.shape[1:]))
        for copy, original in self._copies.items():
            yield copy, known[original]

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource.read`. Rows that only single trained tokens fill are zero here."""
        tensor = self._base.read(self._copies.get(name, name))
        changed = self._tensors.get(name)
        if changed is None:
            return tensor
        kept = min(len(tensor), changed.rows)
        found = tensor.new_zeros((changed.rows, *tensor.shape[1:]))
        found[:kept] = tensor[:kept]
        if changed.added is not None and self._adapter is not None and kept < changed.rows:
            found[kept:] = self._adapter.file.read(changed.added)[kept:].to(tensor.dtype)
        return found
