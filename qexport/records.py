"""The base of all JSON records of an artifact, and the record of a quantized layer, which goes with the layer's tensors
through the pass, then into the manifest and the report. Imports no torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Strict types, no unknown keys, finite floats, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def added(default: Any = None) -> Any:
    """A field that records of earlier versions do not have, which is not written where it has its default: so a record
    that was read has the bytes, and the digest, that it was written with.
    """
    return Field(default=default, exclude_if=lambda value: value == default)


class LayerRecord(Record):
    """What quantizing one layer did."""

    name: str
    """The module's path."""

    method: str
    """How the codes were found: the method's name, or `round_to_nearest` where a calibrated method failed."""

    bits: int

    group_size: int
    """Values that share a scale: along the inputs (for nf4 and fp4, along the flattened matrix)."""

    loss: float | None
    """Mean squared error of the layer's outputs on the calibration tokens, relative to the mean square of the outputs;
    None if the ratio is undefined, or was not measured. The outputs are those of the weight that GPTQ aims at, which
    with `gptaq_alpha` makes up for what quantizing has done to the inputs.
    """

    rtn_loss: float | None
    """The same for plain round-to-nearest with the same bits and groups."""

    damp_percent: float | None
    """The damping that the factorization used, as a fraction of the mean of the Hessian's diagonal; None without
    damping.
    """

    tokens: int
    """Calibration tokens that the layer saw."""

    dead_columns: int
    """Inputs that were zero for every token."""

    @classmethod
    def uncalibrated(cls, name: str, method: str, bits: int, group_size: int) -> LayerRecord:
        """The record of a layer that was quantized without calibration, or by a program that recorded none."""
        return cls(
            name=name,
            method=method,
            bits=bits,
            group_size=group_size,
            loss=None,
            rtn_loss=None,
            damp_percent=None,
            tokens=0,
            dead_columns=0,
        )
