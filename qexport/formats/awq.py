"""AWQ's format, version gemm: 4-bit codes with zero points, packed along the outputs in an interleaved order.

The reference for the bits is AutoAWQ 0.2 (`awq/modules/linear/gemm.py`, `awq/utils/packing_utils.py`), which vLLM, TGI
and gptqmodel read. Eight neighbouring outputs fill an int32 word: its bits 4 j to 4 j + 3 hold the output with the
number `_ORDER[j]` of the eight. Zero points are packed in the same way, as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError, QexportError
from qexport.formats.format import Card, ModuleEncoding, Specs
from qexport.formats.int32_words import WORD_BITS, from_words, to_words
from qexport.formats.stored_weight import (
    WHERE,
    GroupedWeight,
    Scheme,
    SkipList,
    StoredWeight,
    Tensors,
    check_specs,
    modules_with,
    refuse_missing,
    strings,
)
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, Quantized, QuantizedSpec, TensorSpec, WeightSource

BITS: Final = 4
_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The inverse: where in a word each of eight outputs is."""

_IN_A_WORD: Final = WORD_BITS // BITS
_PARTS: Final = ("qweight", "qzeros", "scales")
_ROWS_AT_ONCE: Final = 512


def check_shape(spec: GroupQuantizedSpec) -> str | None:
    """Why a matrix cannot be packed, or None if it can. Needs no weights."""
    if spec.bits != BITS or spec.desc_act:
        return "AWQ has 4-bit codes in the order of the inputs only"
    if spec.out_features % _IN_A_WORD:
        return f"eight codes fill a word only where the outputs are a multiple of 8, not {spec.out_features}"
    if spec.in_features % spec.group_size:
        return f"group_size {spec.group_size} does not divide {spec.in_features} inputs"
    return None


def packed_specs(spec: GroupQuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module."""
    words = spec.out_features // _IN_A_WORD
    return {
        "qweight": TensorSpec((spec.in_features, words), torch.int32),
        "qzeros": TensorSpec((spec.groups, words), torch.int32),
        "scales": TensorSpec((spec.groups, spec.out_features), torch.float16),
    }


def pack(quantized: GroupQuantized) -> dict[str, torch.Tensor]:
    """The tensors of a linear.

    Returns:
        qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] and scales float16 [groups, out].

    Raises:
        QexportError: the shape cannot be packed.
    """
    if reason := check_shape(quantized.spec):
        raise QexportError(f"codes cannot be packed: {reason}")
    columns = quantized.codes.t()
    parts = [_to_words(columns[start : start + _ROWS_AT_ONCE]) for start in range(0, len(columns), _ROWS_AT_ONCE)]
    return {"qweight": torch.cat(parts), "qzeros": _to_words(quantized.zeros), "scales": quantized.scales.contiguous()}


def unpack(tensors: Mapping[str, torch.Tensor], group_size: int, module: str = "") -> GroupQuantized:
    """The inverse of `pack`, for tensors read from a file.

    Args:
        tensors: as `pack` returns them.
        group_size: inputs per group; -1 for one group per row.
        module: the layer's path, for the errors.

    Raises:
        InputError: a tensor is missing, or its shape or dtype does not fit the others.
    """
    in_features, out_features = _features(module, {name: tuple(each.shape) for name, each in tensors.items()})
    group_size = in_features if group_size == -1 else group_size
    spec = GroupQuantizedSpec(out_features, in_features, BITS, group_size, sym=False, desc_act=False)
    if reason := check_shape(spec):
        raise InputError(f"not a packed layer: {reason}", where=module)
    check_specs(tensors, packed_specs(spec), module)
    words = tensors["qweight"]
    codes = torch.empty(spec.shape, dtype=torch.uint8, device=words.device)
    for start in range(0, in_features, _ROWS_AT_ONCE):
        inputs = slice(start, start + _ROWS_AT_ONCE)
        codes[:, inputs] = _from_words(words[inputs]).t()
    g_idx = torch.arange(in_features, dtype=torch.int32, device=words.device) // group_size
    zeros = _from_words(tensors["qzeros"])
    return GroupQuantized(codes, tensors["scales"], zeros, g_idx, BITS, group_size, sym=False, desc_act=False)


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, out] as int32 [rows, out / 8]."""
    return to_words(codes.reshape(len(codes), -1, _IN_A_WORD)[:, :, list(_ORDER)].flatten(1), BITS)


def _from_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, out / 8] as uint8 [rows, out]."""
    return from_words(words, BITS).reshape(len(words), -1, _IN_A_WORD)[:, :, list(_PLACES)].flatten(1)


def _features(module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Inputs and outputs, by the shapes of qweight and scales."""
    qweight, scales = shapes.get("qweight", ()), shapes.get("scales", ())
    if len(qweight) != 2 or len(scales) != 2:
        raise InputError(f"qweight {list(qweight)} and scales {list(scales)} are not matrices", where=module)
    return qweight[0], scales[1]


@dataclass(frozen=True)
class AwqFormat(ModuleEncoding):
    """AWQ's version gemm.

    Attributes:
        group_size: inputs per group, the same for all layers.
    """

    group_size: int

    quant_method: ClassVar[str | None] = "awq"
    holds: ClassVar = (GroupQuantized,)

    def parts(self, spec: QuantizedSpec) -> dict[str, TensorSpec]:
        """qweight, qzeros and scales."""
        assert isinstance(spec, GroupQuantizedSpec)
        return packed_specs(spec)

    def pack(self, value: Quantized) -> dict[str, torch.Tensor]:
        """qweight, qzeros and scales."""
        assert isinstance(value, GroupQuantized)
        return pack(value)

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes must fill whole words."""
        assert isinstance(spec, GroupQuantizedSpec)
        return check_shape(spec)

    def quantization_config(self, specs: Specs, structure: Structure) -> dict[str, Any]:
        """The `quantization_config` for config.json, with the keys of AutoAWQ.

        Modules that stay unquantized have their whole path in it: vLLM looks for it within a path, transformers at the
        start of one.
        """
        unquantized = [
            name.removesuffix(".weight")
            for name, spec in specs.items()
            if structure.in_blocks(name)
            and name.endswith(".weight")
            and isinstance(spec, TensorSpec)
            and len(spec.shape) == 2
        ]
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": unquantized or None,
        }

    @property
    def card(self) -> Card:
        """The format on the model card."""
        return Card("awq", "AWQ 4-bit", f"4-bit AWQ codes in groups of {self.group_size}, with zero points")

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether the `quant_method` is awq."""
        return config is not None and config.get("quant_method") == cls.quant_method

    @staticmethod
    def reader(config: Mapping[str, Any]) -> AwqReader:
        """See `AwqReader`."""
        return AwqReader(config)


class AwqRules:
    """How each module is quantized according to the `quantization_config`.

    Args:
        config: the `quantization_config`.

    Attributes:
        group_size: inputs per group; -1 for one group per row.

    Raises:
        InputError: a value is missing, has a wrong type or is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits, version = config.get("bits", config.get("w_bit")), config.get("version")
        if type(bits) is not int or bits != BITS:
            raise InputError(f"bits is {bits!r}; qexport reads AWQ of 4 bits", where=WHERE)
        if not isinstance(version, str) or version.lower() != "gemm":
            raise InputError(f"version is {version!r}; qexport reads AWQ's version gemm", where=WHERE)
        if config.get("zero_point") is not True:
            raise InputError("zero_point must be true: codes without zero points are not supported", where=WHERE)
        self.group_size = config.get("group_size", config.get("q_group_size"))
        if type(self.group_size) is not int or not (self.group_size == -1 or self.group_size > 0):
            raise InputError(f"group_size is {self.group_size!r}, not a count or -1", where=WHERE)
        where = f"{WHERE}: modules_to_not_convert"
        self._skipped = SkipList(strings(config.get("modules_to_not_convert") or [], where), where)

    def scheme(self, module: str) -> Scheme | None:
        """How the module is quantized; None if it is not."""
        if self._skipped.matches(module):
            return None
        return Scheme(BITS, self.group_size, sym=False, desc_act=False)


@dataclass(frozen=True)
class AwqWeight(GroupedWeight):
    """One module's codes, zero points and scales."""

    parts: tuple[str, ...] = _PARTS

    method: ClassVar[str] = "awq"

    def quantized(self, tensors: Tensors) -> GroupQuantized:
        """See `StoredWeight.quantized`."""
        return unpack(tensors, self.layer.group_size, self.module)


class AwqReader:
    """The reader for `quant_method: awq`.

    Args:
        config: the `quantization_config`; see `AwqRules` for errors.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = AwqRules(config)

    @property
    def description(self) -> str:
        """Bits and groups."""
        return f"AWQ, {BITS} bits, group_size {self._rules.group_size}"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a `qweight`.

        Raises:
            InputError: one of the three tensors is missing.
        """
        specs = source.specs()
        return {module: self._weight(module, specs) for module in modules_with(".qweight", specs)}

    def claimed(self, structure: Structure) -> set[str]:
        """The blocks' linears, except those that the config leaves unquantized."""
        return {linear.name for linear in structure.block_linears if self._rules.scheme(linear.name)}

    def _weight(self, module: str, specs: Mapping[str, TensorSpec]) -> AwqWeight:
        refuse_missing(module, _PARTS, specs)
        inputs, outputs = _features(module, {part: specs[f"{module}.{part}"].shape for part in _PARTS})
        return AwqWeight(module, (outputs, inputs), self._rules.scheme(module))
