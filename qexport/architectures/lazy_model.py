"""A model on the meta device, whose weights are loaded from a source only while they are needed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qexport.architectures.activation_rounding import round_inputs
from qexport.architectures.architecture import Architecture
from qexport.architectures.devices import has_bfloat16_instructions, multiply_in_float32, start_vector_math
from qexport.architectures.memory import return_freed_memory
from qexport.architectures.naming import Part
from qexport.architectures.structure import LinearSpec, find_blocks
from qexport.errors import CompatibilityError, listed
from qexport.tensors import WeightSource
from qexport.tensors.input_rounding import InputRounding


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the non-persistent buffers of a model on the meta device as transformers does.

    Args:
        model: its parameters may still be on the meta device.
        device: the device of the filled buffers.

    Raises:
        CompatibilityError: transformers does not fill a buffer when it initializes the module.
    """
    empty = {
        f"{path}.{leaf}".lstrip("."): buffer
        for path, owner in model.named_modules()
        for leaf in sorted(owner._non_persistent_buffers_set)
        if (buffer := owner._buffers[leaf]) is not None and buffer.is_meta
    }
    computed = [_computed(model, empty, device, before) for before in (0, 1)]
    if left := [name for name in empty if not torch.equal(computed[0][name], computed[1][name])]:
        raise CompatibilityError(
            "transformers does not compute these buffers when it initializes their modules",
            where=listed(left),
            mend="this family needs an entry in qexport/architectures",
        )


def _computed(model: PreTrainedModel, empty: dict[str, Tensor], device: torch.device, before: int) -> dict[str, Tensor]:
    """The buffers after transformers has initialized their modules. Before, floating-point ones are NaN."""
    for name, buffer in empty.items():
        path, _, leaf = name.rpartition(".")
        value = torch.nan if buffer.is_floating_point() else before
        model.get_submodule(path)._buffers[leaf] = torch.full_like(buffer, value, device=device)
    for path, module in reversed(list(model.named_modules())):  # a parent may fill the buffers of its children
        if any(name.startswith(f"{path}." if path else "") for name in empty):
            model._init_weights(module)
    return {name: model.get_buffer(name) for name in empty}


class LazyModel:
    """An architecture's model on the meta device, parts of which can be loaded for a while.

    Args:
        architecture: the model's.
        source: the weights, by their names in files, as in `Structure.parameters`.
        dtype: the dtype to compute in.
        device: where to compute.

    Attributes:
        architecture: the model's.
        structure: the model's.
        roundings: of the inputs of linear layers, see `round_inputs`.
    """

    def __init__(
        self, architecture: Architecture, source: WeightSource, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        start_vector_math()
        self.architecture, self.structure = architecture, architecture.structure
        self.dtype, self.device, self._source, self._naming = dtype, device, source, architecture.naming
        self.roundings: Mapping[str, InputRounding] = {}
        self._model = architecture.empty_model()
        self._model.config.use_cache = False
        self._own_modules = dict(self._model.named_modules(remove_duplicate=False))
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)
        self._layers = find_blocks(self._model)[1]
        self._head = self._model.get_output_embeddings()
        compute_buffers(self._model, device)
        if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16_instructions():
            multiply_in_float32(self._model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, which are released when the context ends."""
        with self._loaded(self.structure.parameters_of(self.structure.blocks[index])):
            yield self._layers[index]

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all its weights, which are released when the context ends; its head computes in float32."""
        with self._loaded(self.structure.parameters), in_float32(self._head):
            return_freed_memory()  # what dequantizing has left; activations are of other sizes
            yield self._model

    def module(self, linear: LinearSpec) -> nn.Module:
        """The module that computes a linear layer; for the matrix of an expert, the module of all experts."""
        return self._model.get_submodule(self.part(linear).parameter.rpartition(".")[0])

    def part(self, linear: LinearSpec) -> Part:
        """Where the weight of a linear layer is in the model."""
        return self._naming.parts[f"{linear.name}.weight"]

    def round_inputs(self, roundings: Mapping[str, InputRounding]) -> list[str]:
        """Rounds the inputs of linear layers from now on, as servers do with W8A8; see `activation_rounding`.

        Args:
            roundings: how, by the names of the layers in files; experts are rounded together.

        Returns:
            The modules of mixtures for which that is not simulated.
        """
        self.roundings = roundings
        owners = {self._owner(name): each for name, each in roundings.items()}
        return [path for path in sorted(owners) if not round_inputs(self._own_modules[path], owners[path])]

    def _owner(self, name: str) -> str:
        """The path of the module that multiplies with a layer's weight; a tied head has none of its own in files."""
        weight = f"{name}.weight"
        tied = {file_name: path for path, file_name in self._naming.files.items() if file_name in self._naming.tied}
        found = tied[weight] if weight in tied else self._naming.parts[weight].parameter
        return found.rpartition(".")[0]

    def parameter(self, name: str) -> Tensor:
        """A loaded tensor by its name in the files, as a view of the parameter in memory."""
        part = self._naming.parts[name]
        return part.of(self._state(part.parameter))

    @contextmanager
    def _loaded(self, names: Iterable[str], *, wide: Container[str] = ()) -> Iterator[None]:
        """Loads tensors; those in `wide` are widened to float32 after they were rounded to the model's dtype."""
        before: dict[str, Tensor] = {}
        try:
            for name in names:
                tensor = self.read(name)
                self._load(name, tensor.to(at_least_float32(tensor.dtype)) if name in wide else tensor, before)
                del tensor
            yield
        finally:
            for path, meta in before.items():
                self._put(path, meta)
            return_freed_memory()

    def read(self, name: str) -> Tensor:
        """A tensor on the model's device, and in its dtype if it is floating point."""
        tensor = self._source.read(name)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)

    def unread(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as the source has them, for a runner that gets them from this one."""
        return {name: self._source.read(name) for name in names}

    def _load(self, name: str, tensor: Tensor, before: dict[str, Tensor]) -> None:
        """Puts a tensor into the model, and adds to `before` what it replaces."""
        part = self._naming.parts[name]
        paths = [part.parameter]
        if self.structure.tied and name == f"{self.structure.embedding}.weight":
            paths += [
                path for path, original in self._model.all_tied_weights_keys.items() if original == part.parameter
            ]
        for path in paths:
            if path not in before:
                before[path] = self._state(path)
                self._put(path, tensor if part.expert is None else self._unfilled(before[path]))
        if part.expert is not None:
            part.of(self._state(part.parameter)).copy_(tensor)

    def _unfilled(self, meta: Tensor) -> Tensor:
        """Storage for a parameter that is read in parts: NaN where no part has been read."""
        return torch.full(meta.shape, torch.nan, dtype=self.dtype, device=self.device)

    def _state(self, path: str) -> Tensor:
        module, _, leaf = path.rpartition(".")
        state: Tensor = self._own_modules[module].state_dict(keep_vars=True)[leaf]
        return state

    def _put(self, path: str, tensor: Tensor) -> None:
        module, _, leaf = path.rpartition(".")
        _put(self._own_modules[module], leaf, tensor)


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@contextmanager
def in_float32(head: nn.Module) -> Iterator[None]:
    """Makes an output head that has its weights compute in float32, if its own dtype is not wider."""
    weight, bias = head._parameters["weight"], head._parameters.get("bias")
    assert weight is not None
    dtype = at_least_float32(weight.dtype)
    _put(head, "weight", weight.to(dtype))
    if bias is not None:
        _put(head, "bias", bias.to(dtype))
    try:
        with inputs_in(head, dtype):
            yield
    finally:
        _put(head, "weight", weight)
        if bias is not None:
            _put(head, "bias", bias)


@contextmanager
def inputs_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Converts the inputs of a module."""
    hook = module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)
