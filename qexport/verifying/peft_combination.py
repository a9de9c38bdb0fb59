"""Several LoRA adapters combined by PEFT's own `add_weighted_adapter`, one layer at a time.

PEFT combines all layers of a model in one call, with the factors of all adapters in memory. What it makes of a layer
depends on that layer's factors alone, so it is called for a model of one layer, at the place that the layer has in the
base: patterns for ranks, scales and targets are PEFT's to apply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qexport.hidden_packages import nothing_compiled
from qexport.tensors.source import TensorSpec, WeightSource
from qexport.verifying.live_adapter import PREFIX, configured, of_peft

_COMBINED: Final = "combined"
"""PEFT's name for the combination."""

_EMBEDDING: Final = ".lora_embedding_A"


@dataclass(frozen=True)
class WeightedPart:
    """One of the adapters.

    Attributes:
        config: its adapter_config.json.
        tensors: its factors, named as PEFT names them.
        weight: its weight in the combination.
    """

    config: Mapping[str, Any]
    tensors: WeightSource
    weight: float


class CombinedByPeft:
    """A `WeightSource`: the factors of the combination in float32, named as PEFT names them.

    Both factors of a layer are computed when the first of them is read; the other is kept until it is read.

    Args:
        parts: the adapters, in their order.
        specs: the tensors of the combination.
        method: PEFT's `combination_type`.
        density: the share of values that the method keeps.
        seed_of: the state of the random numbers with which a layer's values are dropped, by the layer's path.
    """

    def __init__(
        self,
        parts: Sequence[WeightedPart],
        specs: Mapping[str, TensorSpec],
        *,
        method: str,
        density: float,
        seed_of: Callable[[str], int],
    ) -> None:
        self._parts, self._specs, self._method, self._density = parts, specs, method, density
        self._seed_of = seed_of
        self._kept = dict[str, Tensor]()

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource.specs`."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """The combined factor.

        Raises:
            NotMeasured: PEFT cannot combine the adapters.
            InputError: a factor cannot be read.
        """
        if name not in self._kept:
            path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
            keys = [key for key in self._specs if key.startswith(f"{PREFIX}{path}.lora_")]
            self._kept |= self._combined(path, keys)
        return self._kept.pop(name)

    def _combined(self, path: str, keys: Sequence[str]) -> Mapping[str, Tensor]:
        """The factors of one layer by their keys."""
        factors = [
            {key: part.tensors.read(key).to(torch.float32) for key in keys}
            if set(keys) <= part.tensors.specs().keys()
            else {}
            for part in self._parts
        ]
        with of_peft("combine the adapters"), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            with nothing_compiled():
                return self._by_peft(path, factors)

    def _by_peft(self, path: str, factors: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        from peft import get_peft_model_state_dict

        named = {f"adapter-{index}": part for index, part in enumerate(self._parts)}
        having = {name: each for name, each in zip(named, factors, strict=True) if each}
        configs = {name: configured(part.config) for name, part in named.items()}
        live = _live_layer(path, having, configs)
        layer = live.base_model.model.get_submodule(path)
        # PEFT combines a single adapter by `linear`, whatever is asked for, so it must know of those without this layer
        # too; by `cat` it would add up their ranks.
        names = list(having if self._method == "cat" else named)
        live.peft_config.update({name: configs[name] for name in names})
        for name in names:  # PEFT compares ranks and targets of all layers; here they are those of one
            config = configs[name]
            config.r, config.rank_pattern, config.target_modules = layer.r.get(name, max(layer.r.values())), {}, {path}
            config.init_lora_weights = True  # others decompose the weight of the base, which is not here
        _seed_after_injecting(live.base_model, self._seed_of(path))
        live.base_model.add_weighted_adapter(
            names,
            [named[name].weight for name in names],
            _COMBINED,
            combination_type=self._method,
            density=self._density,
        )
        found: Mapping[str, Tensor] = get_peft_model_state_dict(
            live, adapter_name=_COMBINED, save_embedding_layers=False
        )
        return found


def _live_layer(path: str, having: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Any]) -> Any:
    """A PEFT model of one layer with the adapters that change it."""
    from peft import PeftModel, set_peft_model_state_dict

    first, *others = having
    live: Any = PeftModel(_model_of(path, having[first]), configs[first], first, low_cpu_mem_usage=True)
    for name in others:
        live.add_adapter(name, configs[name], low_cpu_mem_usage=True)
    for name, tensors in having.items():
        set_peft_model_state_dict(live, dict(tensors), adapter_name=name, low_cpu_mem_usage=True)
    return live


def _model_of(path: str, factors: Mapping[str, Tensor]) -> nn.Module:
    """A model of one layer, of the kind and the shape that its factors are for, without memory for its weight."""
    shapes = {key.rpartition(".lora_")[2][: len("embedding_A")]: tensor.shape for key, tensor in factors.items()}
    if any(key.endswith(_EMBEDDING) for key in factors):
        rows, columns = shapes["embedding_A"][1], shapes["embedding_B"][0]
        layer: nn.Module = nn.Embedding(rows, columns, device="meta")
    else:
        columns, rows = shapes["A.weight"][1], shapes["B.weight"][0]
        layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(()).expand(rows, columns))
    for name in reversed(path.split(".")):
        parent = nn.Module()
        parent.add_module(name, layer)
        layer = parent
    return layer


def _seed_after_injecting(tuner: Any, seed: int) -> None:
    """Sets the random state between PEFT's initial values for a new adapter and its choice of values to drop."""
    inject = tuner.inject_adapter

    def injecting(*values: Any, **options: Any) -> None:
        inject(*values, **options)
        torch.manual_seed(seed)

    tuner.inject_adapter = injecting
