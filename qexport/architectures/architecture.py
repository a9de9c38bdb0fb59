"""A model as it was loaded: the architecture that its config.json names, its weights, and its other files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from qexport.architectures.naming import Naming, name_parameters
from qexport.architectures.structure import Structure, build_on_meta, describe_model, parse_config
from qexport.artifact.names import model_name
from qexport.tensors.source import Origin, WeightSource


class Architecture:
    """The model that a config.json describes, without weights. Each part is built on first use and cached.

    Args:
        config: the content of config.json.
        like: an architecture that differs at most in its dtype; its cached parts are reused.

    Attributes:
        config: the content of config.json.
    """

    def __init__(self, config: Mapping[str, Any], *, like: Architecture | None = None) -> None:
        self.config = config
        self._like = like
        self._skeletons: dict[torch.dtype | str | None, PreTrainedModel] = {} if like is None else like._skeletons
        self._tuples: list[bool] = [] if like is None else like._tuples

    def __reduce__(self) -> tuple[type[Architecture], tuple[Mapping[str, Any]]]:
        """Other processes build the parts themselves."""
        return Architecture, (self.config,)

    @cached_property
    def parsed(self) -> PretrainedConfig:
        """The configuration as transformers reads it. It is shared: copy it before changing it."""
        return parse_config(self.config)

    @property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device. It is shared: `empty_model` gives a copy that may be changed."""
        if self.parsed.dtype not in self._skeletons:
            own = copy.deepcopy(self.parsed)  # transformers records in it how this model computes attention
            self._skeletons[self.parsed.dtype] = build_on_meta(own)
        return self._skeletons[self.parsed.dtype]

    @cached_property
    def naming(self) -> Naming:
        """The names of the tensors in files."""
        return name_parameters(self.skeleton) if self._like is None else self._like.naming

    @cached_property
    def structure(self) -> Structure:
        """The blocks, the linear layers and the shapes of all parameters."""
        return describe_model(self.skeleton, self.naming) if self._like is None else self._like.structure

    def empty_model(self) -> PreTrainedModel:
        """A copy of the skeleton, to be filled with weights."""
        return copy.deepcopy(self.skeleton)

    def returns_tuples(self, probe: Callable[[], bool]) -> bool:
        """Whether the blocks return tuples, as `probe` finds out; it is called once for all that share parts."""
        if not self._tuples:
            self._tuples.append(probe())
        return self._tuples[0]

    def in_dtype(self, dtype: torch.dtype) -> Architecture:
        """The same architecture with another `dtype` in config.json, which determines the dtype of some buffers."""
        others = {key: value for key, value in self.config.items() if key not in ("dtype", "torch_dtype")}
        return Architecture({**others, "dtype": str(dtype).removeprefix("torch.")}, like=self)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], known: Architecture | None) -> Architecture:
        """The architecture of a config.json. It reuses the parts of a known one if transformers reads the same values
        from both, apart from the dtype.

        Args:
            config: the content of config.json.
            known: an architecture that is probably the same.
        """
        found = cls(config)
        same = known is not None and _without_dtype(found.parsed) == _without_dtype(known.parsed)
        return cls(config, like=known) if same else found


def _without_dtype(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "dtype"}


@dataclass(frozen=True)
class Checkpoint:
    """A base model, or a base model with its adapter merged.

    Attributes:
        architecture: described by its config.json, without the keys that would load code.
        weights: the tensors, named as in the checkpoint's files.
        files: tokenizer, chat template and generation config by file name, byte for byte.
        origin: where it came from.
        adapter: where the adapter that is merged came from; None without one.
    """

    architecture: Architecture
    weights: WeightSource
    files: Mapping[str, bytes]
    origin: Origin
    adapter: Origin | None = None

    @property
    def name(self) -> str:
        """What requests call the model where no release names it: base and adapter."""
        return model_name(self.origin.name, self.adapter.name if self.adapter else None)

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.architecture.config
