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
from qexport.hidden_packages import hidden
from qexport.merge.adapter import MERGE_WITH_PEFT, PREFIX, AdapterOptions
from qexport.merge.changes import ReadFactor
from qexport.merge.plan import MergePlan
from qexport.merge.targets import suffix_matches, targeted
from qexport.merge.whole_tensors import plan_whole_tensors

# The fields that select modules, which qexport has already done.
_MATCHING = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}
)


@dataclass(frozen=True)
class MergedByPeft:
    """A linear layer that PEFT merges.

    Attributes:
        module: the layer's path.
        config: adapter_config.json, restricted to this layer.
        keys: the adapter's tensors for this layer.
    """

    module: str
    config: Mapping[str, Any]
    keys: tuple[str, ...]

    @hidden("bitsandbytes")
    def apply(self, weight: torch.Tensor, read: ReadFactor) -> torch.Tensor:
        """See `Change.apply`."""
        from peft import set_peft_model_state_dict

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        tree = _tree(self.module, layer)
        _inject(self.config, tree)
        loaded: Any = set_peft_model_state_dict(tree, {key.removeprefix(PREFIX): read(key) for key in self.keys})
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        adapted: Any = tree.get_submodule(self.module)
        adapted.merge()
        merged = adapted.get_base_layer().weight.detach()
        assert isinstance(merged, torch.Tensor)
        return merged


@hidden("bitsandbytes")
def plan_through_peft(plan: MergePlan) -> None:
    """Plans the merge of an adapter whose linear layers PEFT merges."""
    known = _known_options(plan.adapter.peft_type)
    options = _options_class(known).parse(plan.adapter.config)
    targets = targeted(options, plan.base)
    _check_patterns(plan.adapter.config, targets)
    plan_whole_tensors(plan, options, targets)
    for path in targets:
        module = plan.base.modules[path]
        if module.kind != "linear":
            plan.refuse(f"{path}: {options.peft_type} on a layer that is not linear", MERGE_WITH_PEFT)
            continue
        plan.refuse_unmergeable(path)
        config = {name: value for name, value in plan.adapter.config.items() if name in known - _MATCHING}
        _plan_layer(plan, path, {**config, "target_modules": [path]})


def _plan_layer(plan: MergePlan, path: str, config: Mapping[str, Any]) -> None:
    from peft import get_peft_model_state_dict

    module = plan.base.modules[path]
    tree = _tree(path, nn.Linear(module.inputs, module.outputs, bias=False, device="meta"))
    _inject(config, tree)
    tensors = get_peft_model_state_dict(tree, save_embedding_layers=False)
    keys = tuple(plan.tensor(f"{PREFIX}{name}", tuple(tensor.shape)) for name, tensor in tensors.items())
    plan.change(f"{path}.weight", MergedByPeft(path, config, keys))


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

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            options = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**config)
            inject_adapter_in_model(options, tree)
        except (TypeError, ValueError) as error:
            raise CompatibilityError(
                f"PEFT refuses this adapter: {error}", where="adapter_config.json", mend=MERGE_WITH_PEFT
            ) from error
