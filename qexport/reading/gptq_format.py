"""AutoGPTQ v1 tensors, as `qexport.packing.gptq` lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.packing import gptq
from qexport.reading.gptq_rules import QuantizationRules
from qexport.reading.stored_format import WHERE, Scheme, StoredWeight, Tensors, refuse_missing
from qexport.tensors import GroupQuantized, TensorSpec, WeightSource

_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqWeight:
    """One module's four tensors. `scheme` is None where the config calls the module dense."""

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: tuple[str, ...] = _PARTS

    def quantized(self, tensors: Tensors) -> GroupQuantized:
        """The codes.

        Raises:
            InputError: shapes or dtypes contradict the config, g_idx leaves the groups, or `sym` does not hold.
        """
        if self.scheme is None:
            raise InputError("a module is quantized that should be dense", where=f"{WHERE}: dynamic, {self.module}")
        return gptq.unpack(
            tensors,
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            sym=self.scheme.sym,
            desc_act=self.scheme.desc_act,
            module=self.module,
        )


class GptqFormat:
    """`quant_method: gptq`.

    Args:
        config: the `quantization_config`.

    Raises:
        InputError: it cannot be followed; see `QuantizationRules`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = QuantizationRules(config)

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a `qweight`.

        Raises:
            InputError: one of the four tensors is missing.
        """
        specs = source.specs()
        modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
        return {module: GptqWeight(module, _shape(module, specs), self._rules.scheme(module)) for module in modules}

    def claimed(self, structure: Structure) -> set[str]:
        """The blocks' linears but those that a rule of `dynamic` leaves dense, and the head where `lm_head` is set."""
        linears = {linear.name for linear in structure.block_linears}
        claimed = {name for name in linears if self._rules.scheme(name)}
        return claimed | ({structure.head} if self._rules.lm_head else set())


def _shape(module: str, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    refuse_missing(module, _PARTS, specs)
    scales, g_idx = specs[f"{module}.scales"].shape, specs[f"{module}.g_idx"].shape
    if len(scales) != 2 or len(g_idx) != 1:
        raise InputError(f"scales {list(scales)} and g_idx {list(g_idx)} are no [groups, out] and [in]", where=module)
    return scales[1], g_idx[0]
