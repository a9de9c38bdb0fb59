"""Merges adapters into a base, lazily: everything is checked first, tensors are merged when they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.errors import InputError, NumericalError, RecipeError
from qexport.merge import MergeSettings
from qexport.merge.adapter import CONFIG_FILE, Adapter, read_adapter
from qexport.merge.changes import Change, ReadFactor
from qexport.merge.combining import Combination, combined
from qexport.merge.ends import refuse_unknown_rows, trained_tokens, untied, with_vocabulary
from qexport.merge.plan import MergePlan
from qexport.merge.replication import with_layers
from qexport.merge.targets import describe_base, ends_with
from qexport.merge.trained_base import as_trained
from qexport.merge.training_evidence import training_evidence
from qexport.merge.types import planner
from qexport.progress import Notice, ProgressCallback, silent
from qexport.tensors.source import Origin, RoundingSource, TensorSpec, WeightSource, is_finite


@dataclass(frozen=True)
class MergedAdapter:
    """What went into a merge, for the manifest.

    Attributes:
        peft_type: for example `LORA`.
        folder: where it is on this machine.
        origin: where the adapter came from.
        changed: the tensors of the base that it changes, in the base's order.
        tokens: those that it names as trained one by one.
        tensors: its tensors, named as PEFT names them.
        config: what stands for its adapter_config.json: without the targets that it has no tensors for, or of a
            combination; None for the file's.
        notes: the notices for the user, for example that the adapter names another base.
        combination: what it is a combination of; None for one adapter.
    """

    peft_type: str
    folder: Path
    origin: Origin
    changed: tuple[str, ...]
    tokens: frozenset[int]
    tensors: WeightSource
    config: Mapping[str, Any] | None
    notes: tuple[str, ...]
    combination: Combination | None = None


@dataclass(frozen=True)
class Merged:
    """The merged model, for all later stages.

    Attributes:
        checkpoint: the base's configuration with the merged dtype, its files, and the merged tensors.
        unrounded: the same in float32: what the tensors are before they are rounded.
        adapter: None if the recipe has none.
        base: the model without the adapter, with the weights that the adapter was merged into.
    """

    checkpoint: Checkpoint
    unrounded: Checkpoint
    adapter: MergedAdapter | None
    base: Checkpoint


def merge(
    checkpoint: Checkpoint,
    adapter: Path | None,
    settings: MergeSettings,
    *,
    adapter_origin: Origin | None = None,
    progress: ProgressCallback = silent,
) -> Merged:
    """Merges an adapter into a base. It reads no tensor of the base, and every tensor of the adapter, one by one.

    Args:
        checkpoint: the base, in 16 or 32 bits.
        adapter: the folder of a PEFT adapter, or None to cast the base only.
        settings: the recipe's `merge`.
        adapter_origin: where the adapter came from; required with an adapter.
        progress: gets a `Notice` for everything that is recorded in `MergedAdapter.notes`.

    Raises:
        InputError: the adapter is malformed, holds NaN or Inf, or was made for another base.
        CompatibilityError: its type, a variant, or a module that it changes cannot be merged; or training cannot have
            quantized this base as the settings say.
        RecipeError: the settings name the base of a training, and there is no adapter.
    """
    if adapter is None:
        if settings.base == "as_trained":
            raise RecipeError(
                "nothing was trained: load.adapter names no adapter", where="merge.base", mend="remove it"
            )
        return _merged(checkpoint, {}, _no_factors, settings, None)
    if adapter_origin is None:
        raise ValueError("an adapter needs its origin")
    found = read_adapter(adapter)
    config = found.config if found.untrained else None
    notes = _notes(checkpoint, found, settings)
    return _merge_adapter(checkpoint, found, settings, adapter_origin, progress, notes=notes, config=config)


def merge_several(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Path, float]],
    settings: MergeSettings,
    *,
    origin: Origin,
    progress: ProgressCallback = silent,
) -> Merged:
    """Merges a combination of LoRA adapters into a base, as `merge` does one.

    Args:
        checkpoint: the base, in 16 or 32 bits.
        adapters: their folders, each with its weight.
        settings: the recipe's `merge`.
        origin: where the combination came from.
        progress: gets a `Notice` for everything that is recorded in `MergedAdapter.notes`.

    Raises:
        InputError: as for `merge`.
        CompatibilityError: as for `merge`, or an adapter cannot be combined with others.
    """
    read = [read_adapter(folder) for folder, _ in adapters]
    notes = [f"{each.folder.name}: {note}" for each in read for note in _notes(checkpoint, each, settings)]
    parts = Combination(read, [weight for _, weight in adapters], settings)
    one = combined(parts, describe_base(checkpoint))
    weights = ", ".join(f"{each.folder.name} {weight:g}" for each, (_, weight) in zip(read, adapters, strict=True))
    notes.append(f"{len(read)} adapters are combined ({settings.combination}): {weights}")
    return _merge_adapter(checkpoint, one, settings, origin, progress, notes=notes, config=one.config, parts=parts)


def _merge_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    settings: MergeSettings,
    origin: Origin,
    progress: ProgressCallback,
    *,
    notes: Sequence[str],
    config: Mapping[str, Any] | None,
    parts: Combination | None = None,
) -> Merged:
    if settings.trained_on is not None:
        checkpoint = as_trained(checkpoint, settings.trained_on)
    original = checkpoint
    checkpoint = with_vocabulary(with_layers(checkpoint, adapter.config), adapter)
    plan, checkpoint = _planned(checkpoint, adapter)
    refuse_unknown_rows(plan, original)
    notes = (*notes, *_notes_on_base(original, checkpoint), *_absent_modules(plan), *_untrained_modules(plan))
    changes = plan.checked_changes()
    plan.check_finite()
    for note in notes:
        progress(Notice(note))
    changed = tuple(name for name in plan.base.weights if name in changes)
    tokens = frozenset(trained_tokens(adapter.config))
    described = MergedAdapter(
        adapter.peft_type, adapter.folder, origin, changed, tokens, adapter.file, config, notes, parts
    )
    return _merged(checkpoint, changes, adapter.read, settings, described)


def _planned(checkpoint: Checkpoint, adapter: Adapter) -> tuple[MergePlan, Checkpoint]:
    """The plan, and the base that it is for: one with a head of its own where the adapter parts tied ends."""
    plan = MergePlan(adapter, describe_base(checkpoint))
    planner(adapter.peft_type)(plan)
    if not plan.parts_ends:
        return plan, checkpoint
    plan.raise_refusals()
    return _planned(untied(checkpoint), adapter)


def _notes_on_base(base: Checkpoint, trained: Checkpoint) -> Iterator[str]:
    """A note for each way in which the base got other ends or layers than it had."""
    was, now = base.architecture.structure, trained.architecture.structure
    if was.vocab_size != now.vocab_size:
        yield f"the adapter was trained with {now.vocab_size} tokens in the embedding, the base has {was.vocab_size}"
    if was.tied and not now.tied:
        yield "the adapter changes the tied embedding and head differently, so the merged model has both"
    if len(was.blocks) != len(now.blocks):
        yield f"the adapter was trained on {len(now.blocks)} layers, repeated from the base's {len(was.blocks)}"


def _notes(checkpoint: Checkpoint, adapter: Adapter, settings: MergeSettings) -> list[str]:
    other = other_base(adapter.config, checkpoint.origin.name)
    if other and settings.strict_base:
        raise InputError(
            other,
            where=f"{CONFIG_FILE}: base_model_name_or_path",
            mend="give that base, or remove merge.strict_base for a warning only",
        )
    trained = [] if settings.base == "as_trained" else quantized_training(adapter, checkpoint)
    return [*([other] if other else []), *trained]


def quantized_training(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """A note if the adapter's folder says that its base was quantized in training, and the given one is not."""
    found = training_evidence(adapter.folder, adapter.config)
    if not found.words or checkpoint.origin.read_as is not None:
        return []
    set_it = f"set merge.base: as_trained and merge.trained_on: {found.settings}; " if found.four_bit else ""
    return [
        f"the adapter was trained on a quantized base ({'; '.join(found.words)}) and is merged onto the stored "
        f"weights, which is safe for every method; to reproduce the trained model at 16 bits, int8 or GPTQ, {set_it}"
        "docs/merging.md says which to choose"
    ]


def _merged(
    base: Checkpoint,
    changes: Mapping[str, tuple[Change, ...]],
    read: ReadFactor,
    settings: MergeSettings,
    adapter: MergedAdapter | None,
) -> Merged:
    rounded, unrounded = (
        replace(
            base,
            architecture=base.architecture.in_dtype(dtype),
            weights=MergedSource(base.weights, changes, read, dtype),
            adapter=adapter.origin if adapter else None,
        )
        for dtype in (getattr(torch, settings.dtype), torch.float32)
    )
    return Merged(rounded, unrounded, adapter, base)


def _untrained_modules(plan: MergePlan) -> Iterator[str]:
    """A note for each name in target_modules for which the adapter has no tensors.

    PEFT leaves such modules as they are, unless training began with random factors.
    """
    for name in plan.adapter.untrained:
        if any(ends_with(path, [name]) for path in plan.base.modules):
            yield f"the adapter has no tensors for {name}, which its target_modules names: it stays as in the base"


def _absent_modules(plan: MergePlan) -> Iterator[str]:
    """A note for each name in modules_to_save that no module has. PEFT ignores these, and adds some itself."""
    for name in plan.adapter.config.get("modules_to_save") or ():
        if not any(path.endswith(name) for path in plan.base.modules):
            yield f"no module of the base ends in {name!r}, which the adapter's modules_to_save names"


def _no_factors(key: str) -> torch.Tensor:
    raise LookupError(key)


_QUANTIZATION = re.compile(
    r"[._-](i?q\d\w*|bf16|f16|f32|(unsloth-)?bnb-[48]bit|[2-8]bit|int[48]|fp8|nf4|gptq|awq)$", re.IGNORECASE
)


def other_base(config: Mapping[str, Any], base_name: str) -> str | None:
    """A note if the adapter names no base, or another one than `base_name`, by last components; else None."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return "the adapter does not say for which base model it was made"
    if _plain_name(named) == _plain_name(base_name):
        return None
    return f"the adapter was made for {_last_component(named)}, the base is {_last_component(base_name)}"


def _plain_name(name: str) -> str:
    """`pkg/SmolLM2-135M-Instruct.Q4_1.gguf`, `HuggingFaceTB/SmolLM2-135M-Instruct` and
    `unsloth/SmolLM2-135M-Instruct-bnb-4bit` are the same model.
    """
    plain = _last_component(name).lower().removesuffix(".gguf")
    while plain != (plain := _QUANTIZATION.sub("", plain)):  # -GPTQ-Int4
        pass
    return plain


def _last_component(name: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/").rstrip("/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    if cached:  # a snapshot in the hub's cache: .../models--org--name/snapshots/commit
        return cached[-1].rpartition("--")[2]
    return parts[-1] if parts else name


class MergedSource:
    """A `WeightSource` over a base: floating-point tensors in one dtype, some of them changed by an adapter.

    Holds no tensor between reads. A read needs the tensor, its merged copy in float32, and its factors.
    """

    def __init__(
        self, base: WeightSource, changes: Mapping[str, tuple[Change, ...]], read_factor: ReadFactor, dtype: torch.dtype
    ) -> None:
        self._base = base
        self._changes = changes
        self._read_factor = read_factor
        self._dtype = dtype

    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's tensors in their order; those of floating point have the merged dtype."""
        return {
            name: replace(spec, dtype=self._dtype) if spec.dtype.is_floating_point else spec
            for name, spec in self._base.specs().items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor: changed in float32 and rounded once.

        Raises:
            InputError: the base's tensor is missing, cut short, or holds NaN or Inf.
            NumericalError: the merged tensor does, because it overflowed.
        """
        changes = self._changes.get(name, ())
        tensor = self._base.read(name) if changes else self._rounded(name)
        if not tensor.is_floating_point() or (not changes and self._stored_dtype(name, tensor) == self._dtype):
            return tensor
        for change in changes:
            tensor = change.apply(tensor, self._read_factor)
        merged = tensor.to(self._dtype).contiguous()
        if not is_finite(merged):
            raise NumericalError(
                f"the merged tensor is not finite in {str(self._dtype).removeprefix('torch.')}",
                where=name,
                mend="set merge.dtype to float32; if that fails too, the adapter's scale is too large",
            )
        return merged

    def _rounded(self, name: str) -> torch.Tensor:
        """A base's tensor, without a copy in its stored dtype where the base can do that."""
        if isinstance(self._base, RoundingSource):
            return self._base.read_rounded(name, self._dtype)
        return self._base.read(name)

    def _stored_dtype(self, name: str, read: torch.Tensor) -> torch.dtype:
        return self._base.specs()[name].dtype if isinstance(self._base, RoundingSource) else read.dtype
