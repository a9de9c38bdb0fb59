"""The methods of the recipe's `quantize`: what each will yield, and its pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from qexport.architectures.structure import Structure
from qexport.formats import Format, FourBitFormat, GptqFormat, LlmInt8Format, MergedFormat, Outputs, W8A8Format
from qexport.progress import Reporter, silent
from qexport.quantize import gptq, rounding
from qexport.quantize.settings import (
    GptqSettings,
    Int8Settings,
    Nf4Settings,
    NoneSettings,
    QuantizeSettings,
    W8a8Settings,
)
from qexport.tensors import CalibrationSet, Checkpoint, OutputSpec, TensorRecord, TensorSpec


def plan_outputs(checkpoint: Checkpoint, structure: Structure, settings: QuantizeSettings) -> Outputs:
    """What `quantize` will yield.

    Raises:
        CompatibilityError: the settings do not fit the model, or nothing would be quantized.
    """
    match settings:
        case GptqSettings():
            specs = gptq.output_specs(checkpoint, structure, settings)
        case NoneSettings():
            specs = dict(checkpoint.weights.specs())
        case _:
            specs = rounding.output_specs(checkpoint, structure, settings)
    return Outputs(_method(settings), specs, tuple(_notes(structure, specs, settings)))


def quantize(
    checkpoint: Checkpoint,
    outputs: Outputs,
    settings: QuantizeSettings,
    calibration: CalibrationSet | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
    report: Reporter = silent,
) -> Iterator[TensorRecord]:
    """Yields every tensor of the model as `plan_outputs` has said, with the memory of one block at most.

    Args:
        checkpoint: the merged model.
        outputs: what will come.
        settings: the recipe's `quantize`.
        calibration: the tokens to look at, for the methods that look.
        dtype: the merged model's dtype.
        device: where to compute.
        scratch: a folder on a disk with room for a block's activations; nothing is left in it.
        report: is told of progress.

    Raises:
        NumericalError: the numbers do not allow it; see the method.
        InputError: a tensor cannot be read.
        OSError: the disk is full.
    """
    if isinstance(settings, GptqSettings):
        assert calibration is not None
        return gptq.quantize(
            checkpoint, settings, calibration, dtype=dtype, device=device, scratch=scratch, report=report
        )
    return rounding.quantize(checkpoint, outputs, device=device, report=report)


def _notes(structure: Structure, specs: Mapping[str, OutputSpec], settings: QuantizeSettings) -> Iterator[str]:
    """Tells of experts that stay dense, since they are most of a mixture's weights."""
    blocks = tuple(f"{block}." for block in structure.blocks)
    dense = [
        name
        for name, spec in specs.items()
        if name.startswith(blocks) and ".experts." in name and isinstance(spec, TensorSpec) and len(spec.shape) > 1
    ]
    if dense and not isinstance(settings, NoneSettings):
        bitsandbytes = isinstance(settings, Nf4Settings | Int8Settings)
        reason = ": bitsandbytes quantizes no experts" if bitsandbytes else ""
        yield f"{len(dense)} tensors of experts stay at 16 bits{reason}"


def _method(settings: QuantizeSettings) -> Format:
    match settings:
        case GptqSettings():
            return GptqFormat(
                bits=settings.bits,
                group_size=settings.group_size,
                sym=settings.sym,
                desc_act=settings.desc_act,
                static_groups=settings.static_groups,
                damp_percent=settings.damp_percent,
                true_sequential=settings.true_sequential,
            )
        case Nf4Settings():
            return FourBitFormat(
                settings.quant_type, settings.block_size, settings.double_quant, settings.compute_dtype
            )
        case Int8Settings():
            return LlmInt8Format(settings.threshold)
        case W8a8Settings():
            return W8A8Format()
        case NoneSettings():
            return MergedFormat()
