"""The base as it was in training: its linear layers rounded to 4 bits by bitsandbytes, and dequantized.

Which layers are quantized follows transformers 5.23 (`replace_with_bnb_linear`, `get_keys_to_not_convert`). The values
are those of bitsandbytes 0.50 (`Params4bit`, `gemm_4bit`): the weight is cast to the dtype that the model is loaded
in and quantized; each value is computed in float32 and rounded once, to the dtype that is computed in. That is usually
the loaded one, to which `dequantize_4bit`, and so PEFT's merge, always rounds. PEFT adds the change in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import CompatibilityError, NumericalError
from qexport.formats.bitsandbytes.four_bit_codes import quantize
from qexport.formats.bitsandbytes.four_bit_tensors import dequantize
from qexport.formats.stored_weight import SkipList
from qexport.merge import TrainedOn
from qexport.tensors import BlockQuantizedSpec
from qexport.tensors.source import TensorSpec, WeightSource, is_finite

_WHERE: Final = "merge.trained_on"


def as_trained(checkpoint: Checkpoint, how: TrainedOn) -> Checkpoint:
    """The base as training saw it. Nothing is read yet.

    Args:
        checkpoint: the stored base.
        how: training quantized it.

    Raises:
        CompatibilityError: the base is quantized already, or `load_in_4bit` quantizes no layer of this model, or not in
            a way that is known.
        InputError: an entry of `skip_modules` is a pattern that is not supported.
    """
    if checkpoint.origin.read_as is not None:
        raise CompatibilityError(
            f"the base is quantized already ({checkpoint.origin.read_as}), so that nothing is left to be rounded",
            where="merge.base: as_trained",
            mend="set merge.base: stored, or name the 16-bit model that training quantized as load.base",
        )
    layers = quantized_layers(checkpoint.architecture, how)
    if not layers:
        raise CompatibilityError(
            f"transformers {how.transformers} quantizes no layer of this model with load_in_4bit, so the adapter was "
            "trained on the stored weights",
            where=_WHERE,
            mend=_mend(checkpoint.architecture.skeleton, how),
        )
    origin = replace(checkpoint.origin, read_as=_words(how))
    return replace(checkpoint, weights=TrainedSource(checkpoint.weights, layers, how), origin=origin)


def quantized_layers(architecture: Architecture, how: TrainedOn) -> dict[str, bool]:
    """The weights that training quantized, by their names in the files, and whether they are stored [in, out].

    Raises:
        CompatibilityError: the model has experts, which transformers 4 had as modules and version 5 as parameters.
    """
    model, naming = architecture.skeleton, architecture.naming
    experts = any(part.expert is not None for part in naming.parts.values())
    if experts and how.transformers == 4:
        raise CompatibilityError(
            "transformers 4 quantized the experts and routers of a mixture, which are no linear layers in version 5",
            where=f"{_WHERE}.transformers",
            mend="set merge.base: stored",
        )
    skipped = SkipList(_skipped(model, how), f"{_WHERE}.skip_modules")
    replaced = _replaced_by(how.transformers)
    # A tied head is the embedding, which stays as it is.
    return {
        naming.files[f"{path}.weight"]: isinstance(module, Conv1D)
        for path, module in model.named_modules()
        if replaced(module) and not skipped.matches(path) and naming.files[f"{path}.weight"] in naming.parts
    }


def _replaced_by(version: int) -> Callable[[nn.Module], bool]:
    def is_replaced(module: nn.Module) -> bool:
        linear = type(module) is nn.Linear if version == 5 else isinstance(module, nn.Linear)
        return linear or isinstance(module, Conv1D)

    return is_replaced


def _skipped(model: PreTrainedModel, how: TrainedOn) -> list[str]:
    """The patterns of modules that are not replaced; a list of the user's replaces transformers' own."""
    wide = list(model._keep_in_fp32_modules or ())
    if how.skip_modules is not None:
        return [*how.skip_modules, *wide]
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    last = list(model.named_parameters())[-1][0]
    head = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
    found = [name.removesuffix(".weight") for name in (*tied, *tied.values(), last)]
    return [*dict.fromkeys([*found, *head]), *wide]


def _mend(model: PreTrainedModel, how: TrainedOn) -> str:
    subclasses = any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in model.modules())
    older = " (or merge.trained_on.transformers: 4, if training ran with that version)"
    return f"set merge.base: stored{older if subclasses and how.transformers == 5 else ''}"


def _words(how: TrainedOn) -> str:
    double = ", double quantization" if how.double_quant else ""
    return f"{how.quant_type.upper()} codes in blocks of {how.block_size}{double}, dequantized, as in training"


class TrainedSource:
    """A `WeightSource` over the stored base: its quantized layers have the values that training computed with.

    A read needs the tensor, its codes, and the tensor that they stand for.

    Args:
        stored: the base as it is stored.
        layers: from `quantized_layers`.
        how: training quantized it.
    """

    def __init__(self, stored: WeightSource, layers: Mapping[str, bool], how: TrainedOn) -> None:
        self._stored, self._layers, self._how = stored, layers, how
        self._dtype = _dtype(how.dtype)
        self._computed = _dtype(how.compute_dtype)

    def specs(self) -> Mapping[str, TensorSpec]:
        """The stored base's; tensors of floating point have training's dtypes."""
        return {name: self._spec(name, each) for name, each in self._stored.specs().items()}

    def _spec(self, name: str, stored: TensorSpec) -> TensorSpec:
        if not stored.dtype.is_floating_point:
            return stored
        computed = self._computed if name in self._layers else None
        return replace(stored, dtype=computed or self._dtype or stored.dtype)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it was in training.

        Raises:
            InputError: the stored tensor is missing, cut short, or holds NaN or Inf.
            NumericalError: a value is out of the range of training's dtype.
        """
        tensor = self._in_dtype(name)
        if name not in self._layers:
            return tensor
        transposed = self._layers[name]
        rounded = self._rounded(tensor.t() if transposed else tensor)
        return rounded.t().contiguous() if transposed else rounded

    def _in_dtype(self, name: str) -> torch.Tensor:
        tensor = self._stored.read(name)
        if self._dtype is None or not tensor.is_floating_point():
            return tensor
        cast = tensor.to(self._dtype)
        if not is_finite(cast):
            raise NumericalError(
                f"the base cannot have been loaded in {self._how.dtype}: a value is out of its range",
                where=name,
                mend="correct merge.trained_on.dtype",
            )
        return cast

    def _rounded(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] rounded to the code book."""
        rows, columns = matrix.shape
        how, dtype = self._how, self._computed or matrix.dtype
        spec = BlockQuantizedSpec(rows, columns, how.quant_type, how.block_size, how.double_quant, dtype)
        return dequantize(quantize(matrix.contiguous(), spec))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
