"""The weights of a GGUF file, dequantized one at a time, under the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from qexport.errors import CompatibilityError, InputError
from qexport.loading.gguf_file import GgufFile
from qexport.tensors.source import TensorSpec

_CHUNK_VALUES: Final = 1 << 20


class GgufWeights:
    """A GGUF file as a `WeightSource`: every tensor is float32, whatever it is stored as.

    Values and order of the rows are those that transformers loads with `GgufConfig(dequantize=True)`.

    Args:
        file: the open file.
        arch: its architecture.
        config: the model's configuration.
        parameters: the names of the model's parameters.
        permuted: the file holds the rows of queries and keys in llama.cpp's order, which is undone.

    Raises:
        CompatibilityError: a tensor is stored in a way that `gguf` cannot dequantize.
    """

    def __init__(
        self,
        file: GgufFile,
        *,
        arch: gguf.MODEL_ARCH,
        config: PretrainedConfig,
        parameters: Iterable[str],
        permuted: bool,
    ) -> None:
        self._file = file
        self._heads = _permuted_heads(config) if permuted else {}
        stored = _stored_names(arch, config.num_hidden_layers, parameters)
        renamed = {name: parameter for parameter, name in stored.items() if name in file.tensors}
        # a tensor without a place in the model keeps the file's name, so that it is reported under it
        self._stored = {renamed.get(name, name): name for name in file.tensors}
        _refuse_unreadable(file)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape, float32, in the file's order."""
        return {
            name: TensorSpec(self._file.tensors[stored].shape, torch.float32) for name, stored in self._stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The dequantized tensor, float32. Its values are not looked at.

        Raises:
            InputError: there is no such tensor, or the file has become shorter.
        """
        if name not in self._stored:
            raise InputError("no such tensor", where=f"{self._file.path}: {name}")
        tensor = self._dequantize(self._stored[name])
        heads = next((heads for module, heads in self._heads.items() if f".{module}." in name), None)
        return tensor if heads is None else _undo_permutation(tensor, heads)

    def place(self, name: str) -> str:
        """The file and the tensor's name in it, for an error's `where`."""
        return f"{self._file.path}: {self._stored[name]}"

    def _dequantize(self, stored: str) -> torch.Tensor:
        """In pieces of rows, because `gguf.dequantize` holds its result twice."""
        tensor = self._file.tensors[stored]
        values = torch.empty(tensor.shape, dtype=torch.float32)
        rows, step = values.view(tensor.rows, tensor.shape[-1]), max(1, _CHUNK_VALUES // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            piece = gguf.dequantize(self._file.read_rows(stored, start, stop), tensor.kind)
            rows[start:stop] = torch.from_numpy(piece)
        return values


def _permuted_heads(config: PretrainedConfig) -> dict[str, int]:
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def _undo_permutation(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from rotary pairs side by side (ggml) back to a head's two halves (transformers).

    Args:
        tensor: [heads * head_dim, ...].
        heads: the heads that the rows belong to.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _stored_names(arch: gguf.MODEL_ARCH, layers: int, parameters: Iterable[str]) -> dict[str, str]:
    """The file's name of each parameter that the architecture has one for."""
    names = gguf.get_tensor_name_map(arch, layers)
    stored = {}
    for parameter in parameters:
        module, _, leaf = parameter.rpartition(".")
        name = names.get_name(module)
        if name is not None:
            stored[parameter] = f"{name}.{leaf}"
    return stored


def _refuse_unreadable(file: GgufFile) -> None:
    first = {tensor.kind: name for name, tensor in file.tensors.items()}
    for kind, name in first.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise CompatibilityError(
                f"the gguf package cannot dequantize {kind.name}", where=f"{file.path}: {name}"
            ) from error
