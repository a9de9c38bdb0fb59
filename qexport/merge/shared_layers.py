"""Types that PEFT merges and whose layers share tensors: a vector bank, projections, vectors of several layers.

PEFT wraps a tree of all layers that the adapter changes, on the meta device, so that it shares what it shares. For one
layer at a time the weight and the adapter's tensors are put in their places, the layer is merged, and everything goes
back to the meta device. The memory is that of one layer and of the shared tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import nn

from qexport.errors import CompatibilityError
from qexport.hidden_packages import hidden
from qexport.merge.adapter import MERGE_WITH_PEFT
from qexport.merge.changes import ReadFactor
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.merge.targets import Module
from qexport.merge.through_peft import MATCHING, mergeable_targets

_NAME = "default"


@hidden("bitsandbytes")
def plan_shared_layers(plan: MergePlan) -> None:
    """Plans the merge of an adapter whose linear layers share tensors, through PEFT."""
    targets, known = mergeable_targets(plan)
    plan.raise_refusals()
    if plan.adapter.config.get("save_projection") is False:
        plan.refuse("save_projection: the adapter stores only the random seed of its projections", MERGE_WITH_PEFT)
        return
    config = {name: value for name, value in plan.adapter.config.items() if name in known - MATCHING}
    layers = _Layers({**config, "target_modules": targets}, {path: plan.base.modules[path] for path in targets})
    shared = list[str]()
    own: dict[str, list[str]] = {path: [] for path in targets}
    for key, shape in layers.stored().items():
        owner = next((path for path in targets if key.startswith(f"{PREFIX}{path}.")), None)
        (shared if owner is None else own[owner]).append(plan.tensor(key, shape, integer=key.endswith("_indices")))
    for path in targets:
        plan.change(f"{path}.weight", MergedTogether(layers, path, (*shared, *own[path])))


class _Layers:
    """All layers of an adapter in PEFT, on the meta device."""

    def __init__(self, config: Mapping[str, Any], modules: Mapping[str, Module]) -> None:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

        tree = nn.Module()
        for path, module in modules.items():
            _attach(tree, path, nn.Linear(module.inputs, module.outputs, bias=False, device="meta"))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                options = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**config)
                wrapped: Any = get_peft_model(tree, options, adapter_name=_NAME, low_cpu_mem_usage=True)
            except (TypeError, ValueError) as error:
                raise CompatibilityError(
                    f"PEFT refuses this adapter: {error}", where="adapter_config.json", mend=MERGE_WITH_PEFT
                ) from error
        wrapped.eval()
        wrapped.load_state_dict = partial(wrapped.load_state_dict, assign=True)
        self._model, self._lock = wrapped, Lock()

    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that PEFT stores for them, with their shapes."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return {key: tuple(tensor.shape) for key, tensor in found.items()}

    def merged(self, path: str, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One layer's weight in float32 with the adapter's tensors; nothing stays in memory."""
        layer = self._model.get_submodule(f"{PREFIX}{path}")
        with self._lock:
            base = layer.get_base_layer()
            empty = base.weight
            base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
            try:
                self._load(tensors)
                layer.merge()
                merged = base.weight.detach()
            finally:
                base.weight = empty
                layer.merged_adapters.clear()
                self._load({key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()})
        assert isinstance(merged, torch.Tensor)
        return merged

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from peft import set_peft_model_state_dict

        loaded: Any = set_peft_model_state_dict(self._model, dict(tensors), adapter_name=_NAME)
        assert not loaded.unexpected_keys, loaded.unexpected_keys


def _attach(tree: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(tree, parent):
            tree.add_module(parent, nn.Module())
        tree = tree.get_submodule(parent)
    tree.add_module(name, layer)


@dataclass(frozen=True)
class MergedTogether:
    """A linear layer that PEFT merges among all that share its tensors.

    Attributes:
        layers: all of them.
        module: the layer's path.
        keys: the adapter's tensors for it, and the shared ones.
    """

    layers: _Layers
    module: str
    keys: Iterable[str]

    @hidden("bitsandbytes")
    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        return self.layers.merged(self.module, weight, {key: read(key) for key in self.keys})
