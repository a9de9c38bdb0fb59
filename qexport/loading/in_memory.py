"""Models that are in memory already, saved as folders, which are then loaded like any other base and adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexport.errors import InputError

_DEFAULT_NAME: Final = "model"
_ORIGINALS: Final = ("base_layer.", "original_module.", "token_adapter.base_layer.")
"""Where PEFT's wrappers keep the module that they wrap."""


@dataclass(frozen=True)
class SavedModel:
    """The folders that a model was saved to.

    Attributes:
        base: the model without its adapter.
        adapter: the adapter, or None.
    """

    base: Path
    adapter: Path | None


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> SavedModel:
    """Writes a model, its tokenizer and its adapter below `folder`. The model in memory is left as it is.

    Args:
        model: with 16-bit or float32 weights; of a `PeftModel`, the active adapter is taken, unmerged.
        tokenizer: the model's.
        folder: an existing folder with room for the model.

    Raises:
        InputError: there is no tokenizer, or the model is quantized, merged, or has several active adapters.
        OSError: the disk is full.
    """
    if tokenizer is None:
        raise InputError("a model in memory needs its tokenizer", where="base", mend="give tokenizer=...")
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(whole, PreTrainedModel)
    _refuse_unusable(whole)
    adapter = _save_adapter(model, folder) if isinstance(model, PeftModel) else None
    base = folder / _name(whole)
    whole.save_pretrained(base, state_dict=dict(_base_tensors(whole)))
    tokenizer.save_pretrained(base)
    return SavedModel(base, adapter)


def _refuse_unusable(model: PreTrainedModel) -> None:
    if getattr(model, "is_quantized", False):
        raise InputError(
            "the model in memory is quantized already",
            where="base",
            mend="load it with 16-bit weights; merge=MergeSettings(base='as_trained', ...) rounds them as training did",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "the adapter was loaded into the model itself (load_adapter)",
            where="base",
            mend="give a PeftModel, or the base model with adapter=...",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("a part of the model is not in memory", where="base", mend="load it without offloading")


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    active = list(model.active_adapters)
    merged = any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules())
    if len(active) != 1 or merged:
        found = "is merged into the base" if merged else f"is one of {len(active)} that are active"
        raise InputError(
            f"the adapter in memory {found}",
            where="base",
            mend="unmerge it (unmerge_adapter), and make one adapter active (set_adapter)",
        )
    path = folder / "adapter"
    model.save_pretrained(str(path), selected_adapters=active)
    return path if active == ["default"] else path / active[0]


def _base_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model in which PEFT has wrapped some modules, under the names that they had before it."""
    wrapped = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    for name, tensor in model.state_dict().items():
        owners = [prefix for prefix in wrapped if name.startswith(prefix)]
        if not owners:
            yield name, tensor
            continue
        owner = min(owners, key=len)
        original = next((part for part in _ORIGINALS if name.startswith(owner + part)), None)
        if original is not None:
            yield owner + name[len(owner) + len(original) :], tensor


def _name(model: PreTrainedModel) -> str:
    """The last component of the place that the model came from, for the manifest."""
    last = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", last).strip(".-") or _DEFAULT_NAME
