"""PEFT adapters for the tests: written by PEFT itself, every trainable value away from its initial one."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.tensors import Origin, TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.verifying.live_adapter import LiveRunner
from qexport.verifying.lockstep import run_in_lockstep

ORIGIN = Origin("folder", "adapter")


def save_adapter(model: PreTrainedModel, config: PeftConfig, folder: Path, *, spread: float = 0.1) -> Path:
    """Writes an adapter for `model`, which is left as it is, as is `config`."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * spread)
        with patch.object(
            PeftModel, "create_or_update_model_card"
        ):  # nobody reads it, and it takes longer than the rest
            adapted.save_pretrained(str(folder))
    return folder


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The live model as PEFT builds it over a copy of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    live.eval()
    return live


def merge_with_peft(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The oracle: every tensor after PEFT's own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = load_adapter(model, folder).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces the tensors of an adapter."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def save_base(model: PreTrainedModel, folder: Path) -> Checkpoint:
    """Writes a model and opens it as a base."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return Checkpoint(
        Architecture(config), SafetensorsFile(folder / "model.safetensors"), {}, Origin("folder", folder.name)
    )


def assert_live_as_in_peft(
    model: PreTrainedModel, base: Checkpoint, adapter: Path, *, changes: bool = True, **options: Any
) -> None:
    """The adapter live block by block computes what PEFT's whole model computes, bit for bit in float32."""
    ids = torch.arange(1, 49).view(2, 24)
    runner = LiveRunner(base, adapter, dtype=torch.float32, device=torch.device("cpu"), **options)
    ((batches,), _) = run_in_lockstep([runner], ids, lambda _: None, drift=False)
    with runner.head() as head, torch.no_grad():
        found = head(batches[0].hidden)
        assert torch.equal(found, load_adapter(model, adapter)(ids).logits)
        assert not changes or not torch.equal(found, model(ids).logits)


class Headers:
    """The base of a model of which only the headers may be looked at."""

    def __init__(self, model: PreTrainedModel) -> None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tensors = model.state_dict().items()
        self._specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors if name not in tied}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def headers_of(model: PreTrainedModel, *, name: str = "base") -> Checkpoint:
    """A base of which no tensor can be read."""
    return Checkpoint(Architecture(model.config.to_dict()), Headers(model), {}, Origin("folder", name))
