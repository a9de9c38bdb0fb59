"""Quantization methods, one file per method. The union has one member per method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args

from pydantic import Field, TypeAdapter

from qexport.gates import ProfileName
from qexport.quantizing.awq import Awq
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.int8 import Int8
from qexport.quantizing.method import Method
from qexport.quantizing.mixed import Mixed
from qexport.quantizing.mxfp4 import Mxfp4
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.nvfp4 import Nvfp4
from qexport.quantizing.w8a8 import W8a8

AnyMethod = Annotated[
    Gptq | Mixed | Awq | Nf4 | Nvfp4 | Mxfp4 | Int8 | W8a8 | Fp8 | NoQuantization, Field(discriminator="method")
]

_METHODS: Final[tuple[type[Method], ...]] = get_args(get_args(AnyMethod)[0])
_ADAPTER: Final[TypeAdapter[Method]] = TypeAdapter(AnyMethod)


def recorded_method(quantize: Mapping[str, Any]) -> Method:
    """The method of a recipe that a manifest records.

    Args:
        quantize: the recipe's `quantize` as JSON values.
    """
    return _ADAPTER.validate_python(quantize)


def profile_of_layer(layer_method: str, bits: int, parameters: int) -> ProfileName | None:
    """The profile of gates for an artifact most of whose layers are quantized in this way.

    Args:
        layer_method: how the layers' codes were found, as a report says it.
        bits: per code.
        parameters: of the merged model; a tied head counts once.

    Returns:
        None if no method has that name.
    """
    for method in _METHODS:
        if layer_method in method.layer_methods:
            return method.profile(bits, parameters)
    return None
