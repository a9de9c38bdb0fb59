"""What a model consists of, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from qexport.architectures.config_bounds import refuse_extreme, refuse_many_experts
from qexport.architectures.families import can_stage
from qexport.architectures.naming import Naming, Part
from qexport.errors import CompatibilityError, InputError
from qexport.tensors import TensorSpec


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer as files store it.

    Attributes:
        name: the name of its weight in files, without `.weight`.
        out_features: outputs.
        in_features: inputs.
        expert: it is the matrix of one expert of a mixture. In memory all experts are in one parameter.
        transposed: the weight is stored [in, out] (GPT-2's Conv1D), and not [out, in].
    """

    name: str
    out_features: int
    in_features: int
    expert: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Structure:
    """The parts of a decoder. All names are those of the checkpoint's files (see `qexport.architectures.naming`).

    Attributes:
        model_type: the family's name, as in config.json.
        blocks: the prefix of each decoder layer, without the dot, in order.
        linears: the linear layers inside each block, by the block's prefix, in the order of definition.
        embedding: the input embedding.
        head: the output head.
        tied: the head uses the embedding's weight.
        parameters: every parameter and persistent buffer with its shape, without a tied head.
        positions: the most tokens of a window if the model has learned position embeddings; else None.
        context: the most tokens that its config names (`max_position_embeddings`); None if it names none.
    """

    model_type: str
    blocks: tuple[str, ...]
    linears: Mapping[str, tuple[LinearSpec, ...]]
    embedding: str
    head: str
    tied: bool
    parameters: Mapping[str, tuple[int, ...]]
    positions: int | None = None
    context: int | None = None

    @property
    def block_linears(self) -> tuple[LinearSpec, ...]:
        """The linear layers inside all blocks, in order."""
        return tuple(linear for block in self.blocks for linear in self.linears[block])

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose unquantized weight is [in, out] (GPT-2's Conv1D)."""
        return frozenset(linear.name for linear in self.block_linears if linear.transposed)

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{block}." for block in self.blocks)

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor or a module is inside a block."""
        return name.startswith(self._prefixes)

    def block_of(self, name: str) -> str | None:
        """The prefix of the block that a tensor or a module is inside; None if it is in none."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), None)

    def parameters_of(self, block: str) -> list[str]:
        """The names of a block's parameters and buffers."""
        return [name for name in self.parameters if name.startswith(f"{block}.")]

    @property
    def outside(self) -> list[str]:
        """The names of the parameters and buffers that are in no block."""
        return [name for name in self.parameters if not self.in_blocks(name)]

    def differences(self, found: Mapping[str, TensorSpec]) -> list[str]:
        """How tensors differ from this model's parameters (missing, unexpected, another shape); one line each."""
        expected = self.parameters
        problems = [f"{name}: missing" for name in expected if name not in found]
        problems += [f"{name}: unexpected" for name in found if name not in expected]
        return problems + [
            f"{name}: shape {list(found[name].shape)}, the model requires {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.parameters[f"{self.embedding}.weight"][0]


def parse_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration as transformers reads it; nothing is downloaded or executed.

    Raises:
        CompatibilityError: transformers does not know the `model_type`.
        InputError: a value cannot be used, or is a number that no model has.
    """
    outside = ("model_type", "transformers_version")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CompatibilityError(
            f"transformers has no native model for model_type {model_type!r}",
            where="config.json: model_type",
            mend="qexport runs no code from model folders; use a checkpoint of a family that transformers knows",
        )
    refuse_extreme(config)
    with _as_input_error():
        values = {key: _with_floats(value) for key, value in config.items() if key not in outside}
        parsed = AutoConfig.for_model(str(model_type), **values)
    assert isinstance(parsed, PretrainedConfig)
    return parsed


def refuse_impossible_depth(config: PretrainedConfig, tensors: int) -> None:
    """Checks the number of layers against the number of tensors, and the number of experts, before a model is built.

    Raises:
        InputError: there are more layers than tensors, or too many experts.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int):
        return
    if layers > tensors:
        raise InputError(
            f"{layers} layers cannot come from {tensors} tensors", where="config.json", mend="fetch the model again"
        )
    refuse_many_experts(config, layers)


@contextmanager
def _as_input_error() -> Iterator[None]:
    """Any error becomes an InputError: each family raises its own for a config.json that contradicts itself."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"transformers cannot build a model from it: {error}", where="config.json", mend="fetch the model again"
        ) from error


def _with_floats(value: Any) -> Any:
    """Infinities as numbers, which transformers writes as `{"__float__": "Infinity"}` (Falcon-H1's time_step_limit)."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _with_floats(item) for key, item in value.items()}


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model on the meta device, in evaluation mode, with sdpa attention if the family has it.

    Raises:
        CompatibilityError: the family has no causal language model in transformers.
        InputError: the configuration contradicts itself.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CompatibilityError(
            f"transformers has no causal language model for model_type {config.model_type!r}",
            where="config.json: model_type",
        )
    with _as_input_error(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def describe_model(model: PreTrainedModel, naming: Naming) -> Structure:
    """The structure of a model that is already built (on any device).

    Args:
        model: the model.
        naming: its names in files.
    """
    prefix, layers = find_blocks(model)
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise CompatibilityError(f"{type(model).__name__} has no output head", where="config.json: architectures")
    linears = {
        block: _linears(model, {name: part for name, part in naming.parts.items() if name.startswith(f"{block}.")})
        for block in (_block_name(naming, f"{prefix}.{index}.") for index in range(len(layers)))
    }
    return Structure(
        model_type=model.config.model_type,
        blocks=tuple(linears),
        linears=linears,
        embedding=naming.module(paths[embedding]),
        head=naming.module(paths[head]),
        tied=bool(model.config.tie_word_embeddings),
        parameters={name: part.shape for name, part in naming.parts.items()},
        positions=_learned_positions(model),
        context=getattr(model.config, "max_position_embeddings", None),
    )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """The rows of a position embedding (GPT-2's `wpe`): an embedding that is not the input embedding."""
    longest = getattr(model.config, "max_position_embeddings", None)
    others = (module for module in model.modules() if module is not model.get_input_embeddings())
    learned = any(isinstance(module, nn.Embedding) and module.num_embeddings == longest for module in others)
    return longest if learned else None


def _block_name(naming: Naming, path: str) -> str:
    """The common prefix of the names of a block's tensors in files."""
    names = [name.split(".") for name, part in naming.parts.items() if part.parameter.startswith(path)]
    common = takewhile(lambda components: len(set(components)) == 1, zip(*names, strict=False))
    return ".".join(components[0] for components in common)


def _linears(model: PreTrainedModel, parts: Mapping[str, Part]) -> tuple[LinearSpec, ...]:
    found = []
    for name, part in parts.items():
        path, _, leaf = part.parameter.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear | Conv1D) and leaf == "weight":
            transposed = isinstance(module, Conv1D)
            outputs, inputs = reversed(part.shape) if transposed else part.shape
            found.append(LinearSpec(name.removesuffix(".weight"), outputs, inputs, transposed=transposed))
        elif part.expert is not None and can_stage(module):
            outputs, inputs = part.shape
            found.append(LinearSpec(name.removesuffix(".weight"), outputs, inputs, expert=True))
    return tuple(found)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The module path and the list of the decoder layers: the ModuleList with one entry per hidden layer.

    Raises:
        CompatibilityError: not exactly one list has that length.
    """
    count = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and "." in name and not _inside_layer(name)
    ]
    if len(found) != 1:
        raise CompatibilityError(
            f"cannot identify the decoder layers of {type(model).__name__}: {len(found)} lists have {count} entries",
            where="config.json: num_hidden_layers",
            mend="this family needs an entry in qexport/architectures",
        )
    return found[0]


def _inside_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
