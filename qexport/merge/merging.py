"""Merges an adapter into a base, lazily: everything is checked at once, tensors are merged when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qexport.errors import InputError
from qexport.merge.adapter import CONFIG_FILE, Adapter, read_adapter
from qexport.merge.base import look_at
from qexport.merge.changes import Change, ReadFactor
from qexport.merge.notes import other_base, other_files
from qexport.merge.plan import Plan
from qexport.merge.settings import MergeSettings
from qexport.merge.source import MergedSource
from qexport.merge.types import planner
from qexport.progress import Notice, Reporter, silent
from qexport.tensors.checkpoint import Checkpoint, Origin


@dataclass(frozen=True)
class MergedAdapter:
    """What went into a merge, for the manifest.

    Attributes:
        peft_type: for example `LORA`.
        folder: where it lies on this machine.
        origin: where the adapter came from.
        changed: the tensors of the base that it changes, in the base's order.
        notes: what a user was told, for example that the adapter names another base.
    """

    peft_type: str
    folder: Path
    origin: Origin
    changed: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Merged:
    """The model that everything after the merge sees.

    Attributes:
        checkpoint: the base's configuration with the merged dtype, its files, and the merged tensors.
        adapter: None where the recipe has none.
        base: the model without the adapter.
    """

    checkpoint: Checkpoint
    adapter: MergedAdapter | None
    base: Checkpoint


def merge(
    checkpoint: Checkpoint,
    adapter: Path | None,
    settings: MergeSettings,
    *,
    adapter_origin: Origin | None = None,
    report: Reporter = silent,
) -> Merged:
    """Lays an adapter over a base. No tensor of the base is read; every tensor of the adapter is, one at a time.

    Args:
        checkpoint: the base, in 16 or 32 bits.
        adapter: the folder of a PEFT adapter, or None to cast the base only.
        settings: the recipe's `merge`.
        adapter_origin: where the adapter came from; needed with one.
        report: gets a `Notice` for everything that is recorded in `MergedAdapter.notes`.

    Raises:
        InputError: the adapter is malformed, holds NaN or Inf, or was made for another base.
        CompatibilityError: its type, a variant, or a module that it changes cannot be merged.
    """
    if adapter is None:
        return Merged(_with_weights(checkpoint, {}, _no_factors, settings), None, checkpoint)
    if adapter_origin is None:
        raise ValueError("an adapter needs its origin")
    return _merge_adapter(checkpoint, read_adapter(adapter), settings, adapter_origin, report)


def _merge_adapter(
    checkpoint: Checkpoint, adapter: Adapter, settings: MergeSettings, origin: Origin, report: Reporter
) -> Merged:
    notes = tuple(_notes(checkpoint, adapter, settings))
    plan = Plan(adapter, look_at(checkpoint))
    planner(adapter.peft_type)(plan)
    changes = plan.settle()
    plan.check_finite()
    for note in notes:
        report(Notice(note))
    changed = tuple(name for name in plan.base.weights if name in changes)
    merged = _with_weights(checkpoint, changes, adapter.read, settings)
    described = MergedAdapter(adapter.peft_type, adapter.folder, origin, changed, notes)
    return Merged(merged, described, checkpoint)


def _notes(checkpoint: Checkpoint, adapter: Adapter, settings: MergeSettings) -> list[str]:
    other = other_base(adapter.config, checkpoint.origin.name)
    if other and settings.strict_base:
        raise InputError(
            other,
            where=f"{CONFIG_FILE}: base_model_name_or_path",
            mend="give that base, or leave merge.strict_base out to be warned only",
        )
    return [*([other] if other else []), *other_files(adapter.folder, checkpoint)]


def _with_weights(
    checkpoint: Checkpoint, changes: Mapping[str, tuple[Change, ...]], read: ReadFactor, settings: MergeSettings
) -> Checkpoint:
    config: dict[str, Any] = {**checkpoint.config, "dtype": settings.dtype}
    config.pop("torch_dtype", None)  # what older versions of transformers called it
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return replace(checkpoint, config=config, weights=MergedSource(checkpoint.weights, changes, read, dtype))


def _no_factors(key: str) -> torch.Tensor:
    raise LookupError(key)
