"""What a model consists of, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qexport.errors import CompatibilityError


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer: its module path and its shape."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Structure:
    """The parts of a decoder.

    Attributes:
        model_type: the family's name, as in config.json.
        blocks: the module path of each decoder layer, in order.
        linears: the linear layers inside each block, by the block's path, in the order of definition.
        embedding: the module path of the input embedding.
        head: the module path of the output head.
        tied: the head uses the embedding's weight.
        parameters: every parameter and persistent buffer with its shape; a tied head is left out.
    """

    model_type: str
    blocks: tuple[str, ...]
    linears: Mapping[str, tuple[LinearSpec, ...]]
    embedding: str
    head: str
    tied: bool
    parameters: Mapping[str, tuple[int, ...]]

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.parameters[f"{self.embedding}.weight"][0]


def parse_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration as transformers reads it; nothing is downloaded or executed.

    Raises:
        CompatibilityError: transformers does not know the `model_type`.
    """
    values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    model_type = config.get("model_type")
    try:
        parsed = AutoConfig.for_model(str(model_type), **values)
    except ValueError as error:
        raise CompatibilityError(
            f"transformers has no native model for model_type {model_type!r}",
            where="config.json: model_type",
            mend="qexport runs no code from model folders; use a checkpoint of a family that transformers knows",
        ) from error
    assert isinstance(parsed, PretrainedConfig)
    return parsed


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model without storage, in evaluation mode, with sdpa attention where the family has it.

    Raises:
        CompatibilityError: the family has no causal language model in transformers.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise CompatibilityError(
            f"transformers has no causal language model for model_type {config.model_type!r}",
            where="config.json: model_type",
        ) from error
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def describe(config: Mapping[str, Any]) -> Structure:
    """The structure of the model that config.json names. Allocates no weights.

    Raises:
        CompatibilityError: the family is unknown, or its decoder layers cannot be found.
    """
    parsed = parse_config(config)
    return describe_model(build_on_meta(parsed))


def describe_model(model: PreTrainedModel) -> Structure:
    """The structure of a model that is already built (on any device)."""
    prefix, layers = find_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise CompatibilityError(f"{type(model).__name__} has no output head", where="config.json: architectures")
    tied = bool(model.config.tie_word_embeddings)
    blocks = tuple(f"{prefix}.{index}" for index in range(len(layers)))
    linears = {
        block: tuple(
            LinearSpec(f"{block}.{name}", module.out_features, module.in_features)
            for name, module in layers[index].named_modules()
            if isinstance(module, nn.Linear)
        )
        for index, block in enumerate(blocks)
    }
    tied_names = set(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied_names}
    return Structure(model.config.model_type, blocks, linears, names[embedding], names[head], tied, parameters)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The module path and the list of the decoder layers: the ModuleList with one entry per hidden layer.

    Raises:
        CompatibilityError: there is none, or more than one.
    """
    count = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and "." in name and not _inside_layer(name)
    ]
    if len(found) != 1:
        raise CompatibilityError(
            f"cannot tell the decoder layers of {type(model).__name__}: {len(found)} lists have {count} entries",
            where="config.json: num_hidden_layers",
            mend="this family needs an entry in qexport/architectures",
        )
    return found[0]


def _inside_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
