"""The weights of a model: checked against its architecture before any is read, and for NaN and Inf when read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import refuse_impossible_depth
from qexport.errors import InputError, listed
from qexport.tensors.source import RoundingSource, TensorSpec, WeightSource, is_finite

FLOAT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

_OUTDATED_BUFFERS: Final = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that older checkpoints hold and that every model computes; transformers ignores them too."""


class PlacedSource(WeightSource, Protocol):
    """A source that can say where a tensor is."""

    def place(self, name: str) -> str:
        """The tensor's file and name, for an error's `where`."""
        ...


class ChunkedSource(PlacedSource, Protocol):
    """A source whose tensors can be compared without loading them as a whole."""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of a fixed size."""
        ...


class ModelWeights:
    """The tensors that the model's architecture requires, in its order. A `WeightSource`.

    Args:
        source: where they are read from.
        names: the names to provide; every one is in the source.
    """

    def __init__(self, source: PlacedSource, names: Sequence[str]) -> None:
        self._source = source
        found = source.specs()
        self._specs = {name: found[name] for name in names}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape and dtype, in the order of the model's modules."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """The tensor in newly allocated memory.

        Raises:
            InputError: it is missing, cut short, or holds NaN or Inf.
        """
        if name not in self._specs:
            raise InputError("the model has no tensor with this name", where=name)
        tensor = self._source.read(name)
        if not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{count} of {tensor.numel()} values are NaN or Inf",
                where=self._source.place(name),
                mend="fetch the file again; if its digest is right, the model itself is broken",
            )
        return tensor

    def read_rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See `RoundingSource.read_rounded`."""
        if isinstance(self._source, RoundingSource) and name in self._specs:
            rounded = self._source.read_rounded(name, dtype)
            if is_finite(rounded):
                return rounded
        tensor = self.read(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def find_architecture(config: Mapping[str, Any], *, tensors: int) -> Architecture:
    """The architecture that the configuration names.

    Args:
        config: the content of config.json.
        tensors: how many tensors the checkpoint has; a model cannot have more layers than that.
    """
    architecture = Architecture(config)
    refuse_impossible_depth(architecture.parsed, tensors)
    assert architecture.naming
    return architecture


def refuse_untied_copies(source: ChunkedSource, tied: Mapping[str, str]) -> None:
    """Compares each stored copy of a tied weight with the weight that it is tied to, bit for bit.

    Args:
        source: the checkpoint's tensors.
        tied: the name of the weight that each tied name stands for.

    Raises:
        InputError: the copy differs, so that dropping it would change the model.
    """
    specs = source.specs()
    for copy, original in tied.items():
        if copy not in specs or original not in specs:
            continue
        same = specs[copy] == specs[original] and all(
            left == right for left, right in zip(source.chunks(copy), source.chunks(original), strict=True)
        )
        if not same:
            raise InputError(
                f"config.json ties {copy} to {original}, but the checkpoint holds two different tensors",
                where=source.place(copy),
                mend="set tie_word_embeddings to false in config.json if the model was trained that way",
            )


def fit_to_model(source: PlacedSource, architecture: Architecture) -> ModelWeights:
    """The source's tensors as the model's weights.

    Raises:
        InputError: tensors are missing, unexpected, or of another shape or dtype than the architecture's; all of them
            are listed.
    """
    model, naming, found = architecture.skeleton, architecture.naming, source.specs()
    expected = naming.parts
    ignored = set(naming.tied) | {name for name in found if _is_ignorable(name, model)}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in ignored]
    problems = [f"{name}: missing" for name in missing]
    problems += [f"{source.place(name)}: unexpected" for name in unexpected]
    floats = {path for path, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, part in expected.items():
        if name in found:
            problems += _faults(found[name], part.shape, is_float=part.parameter in floats, place=source.place(name))
    if problems:
        raise InputError(
            f"the weights do not fit config.json: {len(problems)} tensors",
            where=listed(problems),
            mend=_mend(missing, unexpected, model.base_model_prefix),
        )
    return ModelWeights(source, list(expected))


def _faults(spec: TensorSpec, shape: tuple[int, ...], *, is_float: bool, place: str) -> list[str]:
    faults = []
    if spec.shape != shape:
        faults.append(f"{place}: shape {list(spec.shape)}, but config.json requires {list(shape)}")
    if is_float and spec.dtype not in FLOAT_DTYPES:
        faults.append(
            f"{place}: {str(spec.dtype).removeprefix('torch.')}, but weights are bfloat16, float16 or float32"
        )
    return faults


def _is_ignorable(name: str, model: PreTrainedModel) -> bool:
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), *_OUTDATED_BUFFERS)
    return any(re.search(pattern, name) for pattern in patterns)


def _mend(missing: Sequence[str], unexpected: Sequence[str], prefix: str) -> str:
    if any(f"{prefix}.{name}" in missing for name in unexpected):
        return f"the names lack the prefix {prefix!r}: save the model from its ...ForCausalLM class"
    return "fetch the model again; if it was changed by hand, config.json and the weights must be changed together"
