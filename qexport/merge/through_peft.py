"""Types that PEFT itself merges, one linear layer at a time.

A layer of the base is put alone into a tree of empty modules, at its own path; PEFT wraps it with the adapter, loads
the adapter's tensors and merges. So the arithmetic is PEFT's, and the memory is that of one layer. Only types whose
layers are independent of each other can be merged this way. PEFT is imported only when it is needed, because the
import costs about 100 MB.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from qexport.errors import CompatibilityError
from qexport.hidden_packages import hidden, nothing_compiled
from qexport.merge.adapter import MERGE_WITH_PEFT, AdapterOptions
from qexport.merge.changes import ReadFactor
from qexport.merge.plan import MergePlan
from qexport.merge.stored import PREFIX
from qexport.merge.targets import suffix_matches, targeted
from qexport.merge.whole_tensors import plan_whole_tensors

MATCHING = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}
)
"""The fields that select modules, which qexport has already done."""


@dataclass(frozen=True)
class MergedByPeft:
    """A linear layer that PEFT merges.

    Attributes:
        module: the layer's path.
        config: adapter_config.json, restricted to this layer.
        keys: the adapter's tensors for this layer.
        inputs: of the layer, where its bias is merged; 0 for the weight.
    """

    module: str
    config: Mapping[str, Any]
    keys: tuple[str, ...]
    inputs: int = 0

    @hidden("bitsandbytes")
    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        from peft import set_peft_model_state_dict

        tree = _tree(self.module, self._layer(weight.to(torch.float32, copy=True)))
        _inject(self.config, tree)
        loaded: Any = set_peft_model_state_dict(tree, {key.removeprefix(PREFIX): read(key) for key in self.keys})
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        adapted: Any = tree.get_submodule(self.module)
        adapted.merge()
        base = adapted.get_base_layer()
        merged = (base.bias if self.inputs else base.weight).detach()
        assert isinstance(merged, torch.Tensor)
        return merged

    def _layer(self, tensor: torch.Tensor) -> nn.Linear:
        """The layer with this weight, or with this bias and a weight of zeros."""
        outputs, inputs = (len(tensor), self.inputs) if self.inputs else tensor.shape
        layer = nn.Linear(inputs, outputs, bias=bool(self.inputs), device="meta")
        weight = tensor.new_zeros((outputs, inputs)) if self.inputs else tensor
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.inputs:
            layer.bias = nn.Parameter(tensor, requires_grad=False)
        return layer


@hidden("bitsandbytes")
def plan_through_peft(plan: MergePlan, *, biases: bool = False) -> None:
    """Plans the merge of an adapter whose linear layers PEFT merges.

    Args:
        plan: the plan.
        biases: the type changes a layer's bias as well, whatever its weight is.
    """
    targets, known = mergeable_targets(plan)
    for path in targets:
        config = {name: value for name, value in plan.adapter.config.items() if name in known - MATCHING}
        _plan_layer(plan, path, {**config, "target_modules": [path]}, biases=biases)


def mergeable_targets(plan: MergePlan) -> tuple[list[str], frozenset[str]]:
    """The linear layers that the adapter changes, and the fields of its type. Whole tensors are planned here."""
    known = _known_options(plan.adapter.peft_type)
    options = _options_class(known).parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    _check_patterns(plan.adapter.config, targets)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        if plan.base.modules[path].kind == "linear":
            plan.refuse_unmergeable(path)
        else:
            plan.refuse(f"{path}: {options.peft_type} on a layer that is not linear", MERGE_WITH_PEFT)
    return [path for path in targets if plan.base.modules[path].kind == "linear"], known


def _plan_layer(plan: MergePlan, path: str, config: Mapping[str, Any], *, biases: bool) -> None:
    from peft import get_peft_model_state_dict

    module = plan.base.modules[path]
    tree = _tree(path, nn.Linear(module.inputs, module.outputs, bias=False, device="meta"))
    _inject(config, tree)
    tensors = get_peft_model_state_dict(tree, save_embedding_layers=False)
    keys = tuple(
        plan.tensor(f"{PREFIX}{name}", tuple(tensor.shape), integer=not tensor.dtype.is_floating_point)
        for name, tensor in tensors.items()
    )
    plan.change(f"{path}.weight", MergedByPeft(path, config, keys))
    if biases and module.has_bias:
        plan.change(f"{path}.bias", MergedByPeft(path, config, keys, inputs=module.inputs))


def _known_options(peft_type: str) -> frozenset[str]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    return frozenset(field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]))


def _options_class(known: frozenset[str]) -> type[AdapterOptions]:
    """Options that accept every field of PEFT's own configuration class, since PEFT applies them."""
    return type("PeftOptions", (AdapterOptions,), {"without_effect": known})


def _check_patterns(config: Mapping[str, Any], targets: list[str]) -> None:
    """Checks regular expressions (rank_pattern and the like) that PEFT will match without a limit of time."""
    for name, value in config.items():
        if name.endswith("_pattern") and isinstance(value, dict):
            for key in value:
                suffix_matches(key, targets, field=name)


def _tree(path: str, layer: nn.Module) -> nn.Module:
    for name in reversed(path.split(".")):
        parent = nn.Module()
        parent.add_module(name, layer)
        layer = parent
    return layer


def _inject(config: Mapping[str, Any], tree: nn.Module) -> None:
    """Wraps the layer in the tree with an untrained adapter, without changing the global random state."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, inject_adapter_in_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), nothing_compiled():
        warnings.simplefilter("ignore")
        try:
            options = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**config)
            inject_adapter_in_model(options, tree)
        except (TypeError, ValueError) as error:
            raise CompatibilityError(
                f"PEFT refuses this adapter: {error}", where="adapter_config.json", mend=MERGE_WITH_PEFT
            ) from error
