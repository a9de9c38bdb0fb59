"""What the readers of formats share: weights as headers describe them, and how configs name modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import torch

from qexport.errors import InputError
from qexport.tensors import GroupQuantizedSpec, Quantized, TensorSpec
from qexport.tensors.float4 import Float4Kind
from qexport.tensors.float8 import Block
from qexport.tensors.input_rounding import InputRounding

_REPETITION: Final = re.compile(r"(?<!\\)[*+?{]")
_ANYTHING: Final = re.compile(r"\.\*")
_TO_A_BOUNDARY: Final = r"(?:{})(?:(?<=\.)|(?=\.|$))"


def compiled(pattern: str, where: str, *, template: str = "{}") -> re.Pattern[str]:
    """Compiles a pattern whose only repetition is `.*`, at most twice.

    Args:
        pattern: a regular expression from a file.
        where: its place, for the errors.
        template: an expression around it.

    Raises:
        InputError: it has other repetitions, which can take exponential time, or is not a regular expression.
    """
    if _REPETITION.search(_ANYTHING.sub("", pattern)) or len(_ANYTHING.findall(pattern)) > 2:
        raise InputError(
            "a pattern that repeats (* + ? {) is not supported", where=where, mend="name the modules themselves"
        )
    try:
        return re.compile(template.replace("{}", pattern))
    except re.error as error:
        raise InputError(f"not a regular expression: {error}", where=where) from error


def strings(value: Any, where: str) -> list[str]:
    """The value, checked to be a list of strings.

    Raises:
        InputError: it is not a list of strings.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError("must be a list of strings", where=where)
    return value


class SkipList:
    """Modules that stay unquantized, matched as in transformers (`quantizers_utils.should_convert_module`, 5.23).

    A pattern matches as a regular expression from the start of a module's path up to a dot, or as the end of the path.

    Args:
        patterns: the list.
        where: its place, for the errors.

    Raises:
        InputError: a pattern is not supported; see `compiled`.
    """

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        self._suffixes = tuple(patterns)
        self._starts = [compiled(pattern, where, template=_TO_A_BOUNDARY) for pattern in patterns]

    def matches(self, module: str) -> bool:
        """Whether the module stays unquantized."""
        return module.endswith(self._suffixes) or any(start.match(module) for start in self._starts)


WHERE: Final = "config.json: quantization_config"

SCALE_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of scales in the folders of compressed-tensors and DeepSeek."""

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one module, by their names inside it: `qweight`, or `weight.absmax`."""


@dataclass(frozen=True)
class Scheme:
    """How to read a module's codes.

    Attributes:
        bits: bits per code.
        group_size: inputs per group; -1 for one group per row.
        sym: the codes are symmetric.
        desc_act: the groups follow activation order.
        block: the rows and columns that share a scale, where codes are in e4m3; else None.
        float4: which scales there are, where codes are in e2m1; else None.
        input_rounding: how servers round the inputs; None if they do not.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    block: Block | None = None
    float4: Float4Kind | None = None
    input_rounding: InputRounding | None = None


@dataclass(frozen=True)
class StoredLayer:
    """One quantized module, as shown to users.

    Attributes:
        method: how it was quantized, as far as its format says: `gptq` for all codes in groups along the inputs.
        bits: bits per code.
        group_size: values that share a scale.
        shape: [out, in].
        input_rounding: how servers round its inputs; None if they do not.
    """

    method: str
    bits: int
    group_size: int
    shape: tuple[int, int]
    input_rounding: InputRounding | None = None


def input_roundings(layers: Mapping[str, StoredLayer]) -> dict[str, InputRounding]:
    """How servers round the inputs of those layers whose inputs they round, by path."""
    return {path: layer.input_rounding for path, layer in layers.items() if layer.input_rounding is not None}


class StoredWeight(Protocol):
    """One quantized weight, as headers and config describe it. Holds no large tensors."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors inside the module."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        ...

    @property
    def layer(self) -> StoredLayer:
        """The module as shown to users.

        Raises:
            InputError: the module has codes, but is unquantized according to the config.
        """
        ...

    @property
    def grid(self) -> GroupQuantizedSpec | None:
        """Bits, groups and symmetry if the codes are in groups of equal size along the inputs, else None."""
        ...

    def quantized(self, tensors: Tensors) -> Quantized:
        """The codes in these tensors, on the tensors' device.

        Raises:
            InputError: the tensors contradict each other or the config, or a value is out of range.
        """
        ...


@dataclass(frozen=True)
class GroupedWeight:
    """A weight of any format whose codes are in groups along the inputs.

    Attributes:
        module: its path.
        shape: [out, in].
        scheme: how to read the codes; None if the module is unquantized according to the config.
        parts: the names of its tensors inside the module.
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: tuple[str, ...]

    method: ClassVar[str] = "gptq"
    """See `StoredLayer.method`."""

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        scheme = scheme_of(self)
        return StoredLayer(self.method, scheme.bits, self._group_size(scheme), self.shape, scheme.input_rounding)

    @property
    def grid(self) -> GroupQuantizedSpec | None:
        """See `StoredWeight.grid`."""
        if self.scheme is None or self.shape[1] % self._group_size(self.scheme):
            return None
        bits, sym, desc_act = self.scheme.bits, self.scheme.sym, self.scheme.desc_act
        return GroupQuantizedSpec(*self.shape, bits, self._group_size(self.scheme), sym, desc_act)

    def _group_size(self, scheme: Scheme) -> int:
        return self.shape[1] if scheme.group_size == -1 else scheme.group_size


class _OfConfig(Protocol):
    """A module with what the config says of it."""

    @property
    def module(self) -> str: ...

    @property
    def scheme(self) -> Scheme | None: ...


def scheme_of(weight: _OfConfig) -> Scheme:
    """How a module's codes are read.

    Raises:
        InputError: it is unquantized according to the config.
    """
    if weight.scheme is None:
        raise InputError(
            "the module is quantized, but unquantized according to the config",
            where=f"{WHERE}, {weight.module}",
            mend="fetch the artifact again, or ask its author: weights and config.json do not belong together",
        )
    return weight.scheme


def check_specs(tensors: Tensors, specs: Mapping[str, TensorSpec], module: str) -> None:
    """Compares tensors with the specs that they should have; tensors without a spec are ignored.

    Args:
        tensors: by their names inside the module.
        specs: the expected shapes and dtypes.
        module: the layer's path; may be empty.

    Raises:
        InputError: a tensor is missing, or has another shape or dtype.
    """
    for name, expected in specs.items():
        if name not in tensors:
            raise InputError("a tensor of a quantized layer is missing", where=place(module, name))
        found = TensorSpec(tuple(tensors[name].shape), tensors[name].dtype)
        if not expected.admits(found):
            raise InputError(
                f"expected {expected.dtype} {list(expected.shape)}, found {found.dtype} {list(found.shape)}",
                where=place(module, name),
                mend="check the quantization config against the tensors",
            )


def widened(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32, which holds the values of every dtype that programs store them in; others stay as they are."""
    return scales.to(torch.float32) if scales.dtype in SCALE_DTYPES else scales


def place(module: str, name: str) -> str:
    """The place of a tensor, for an error."""
    return f"{module}.{name}" if module else name


def refuse_missing(module: str, parts: Iterable[str], specs: Mapping[str, TensorSpec]) -> None:
    """Refuses a quantized module that lacks one of its tensors.

    Raises:
        InputError: tensors are missing; the error names all of them.
    """
    if missing := [part for part in parts if f"{module}.{part}" not in specs]:
        raise InputError(f"a quantized module lacks {', '.join(missing)}", where=module)


def int8_shape(module: str, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[out, in] of a module whose `weight` is a matrix of int8 codes.

    Raises:
        InputError: the weight is not an int8 matrix.
    """
    codes = specs[f"{module}.weight"]
    if len(codes.shape) != 2 or codes.dtype != torch.int8:
        raise InputError(f"{codes.dtype} {list(codes.shape)} is not an int8 matrix", where=f"{module}.weight")
    return codes.shape[0], codes.shape[1]


def modules_with(suffix: str, names: Iterable[str]) -> list[str]:
    """The paths of the modules that have a tensor with this suffix, which begins with a dot."""
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
