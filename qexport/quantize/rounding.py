"""The methods that round each weight on its own: nf4, int8, w8a8, and `none`, which rounds nothing.

No forward pass, no model: tensors are read, merged, quantized and handed on one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import torch

from qexport.architectures.families import family, matching
from qexport.architectures.structure import LinearSpec, Structure
from qexport.errors import CompatibilityError
from qexport.formats import Format, FourBitFormat, Outputs, W8A8Format
from qexport.progress import Progress, Reporter, silent
from qexport.quantize import bitsandbytes_4bit, row_int8
from qexport.quantize.settings import Nf4Settings, RoundingSettings, W8a8Settings
from qexport.tensors import (
    BlockQuantizedSpec,
    Checkpoint,
    GroupQuantizedSpec,
    LayerReport,
    OutputSpec,
    Quantized,
    QuantizedSpec,
    RowQuantizedSpec,
    TensorRecord,
    TensorSpec,
    WeightSource,
)


def output_specs(checkpoint: Checkpoint, structure: Structure, settings: RoundingSettings) -> dict[str, OutputSpec]:
    """What `quantize` will yield, by parameter name.

    Raises:
        CompatibilityError: a pattern matches nothing, or nothing is left to quantize.
    """
    specs: dict[str, OutputSpec] = dict(checkpoint.weights.specs())
    dense = checkpoint.weights.specs()
    for linear in select(structure, settings):
        name = f"{linear.name}.weight"
        specs[name] = _spec(linear, dense[name], settings)
    return specs


def select(structure: Structure, settings: RoundingSettings) -> list[LinearSpec]:
    """The linear layers to quantize: all inside the blocks but those that the family or the recipe keeps dense.

    bitsandbytes replaces modules, and the experts of a mixture are none: with nf4 and int8 they stay dense.

    Raises:
        CompatibilityError: a pattern matches nothing, or nothing is left to quantize. All problems are in one message.
    """
    with_experts = isinstance(settings, W8a8Settings)
    linears = [linear for linear in structure.block_linears if with_experts or not linear.expert]
    kept = {name for name in (linear.name for linear in linears) if matching(_kept(structure), name) is not None}
    problems = _unmatched("skip_modules", settings.skip_modules, {linear.name for linear in linears})
    problems += _unmatched("force_modules", settings.force_modules, kept)
    kept = {name for name in kept if not _any(settings.force_modules, name)}
    chosen = [linear for linear in linears if linear.name not in kept and not _any(settings.skip_modules, linear.name)]
    if not chosen and not problems:
        problems.append("no layer is left to quantize: every linear layer is dense by skip_modules or family")
    problems += [
        f"{linear.name} is named by skip_modules and by force_modules"
        for linear in linears
        if _any(settings.skip_modules, linear.name) and _any(settings.force_modules, linear.name)
    ]
    if isinstance(settings, W8a8Settings) and any(linear.transposed for linear in chosen):
        problems.append(
            "w8a8 does not fit layers whose weights are stored [in, out] (GPT-2's Conv1D): compressed-tensors knows no "
            "such layers, and vLLM would transpose their codes; take gptq"
        )
    if problems:
        raise CompatibilityError("\n".join(problems), where="quantize")
    return chosen


def quantize(
    checkpoint: Checkpoint, outputs: Outputs, *, device: torch.device, report: Reporter = silent
) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, one after the other, quantized where `outputs` says so.

    Args:
        checkpoint: the merged model.
        outputs: what will come.
        device: where to compute.
        report: is told of each tensor.

    Raises:
        InputError: a tensor cannot be read.
    """
    merged_ahead = _ahead(checkpoint.weights, outputs.specs)
    for done, ((name, spec), merged) in enumerate(zip(outputs.specs.items(), merged_ahead, strict=True)):
        report(Progress("quantize", done, len(outputs.specs), "tensor", name))
        if isinstance(spec, TensorSpec):
            yield TensorRecord(name, merged)
            continue
        layer = LayerReport(name.removesuffix(".weight"), _layer_method(outputs.format))
        assert not isinstance(spec, GroupQuantizedSpec)
        matrix = merged.t().contiguous() if spec.transposed else merged  # every format has the codes [out, in]
        value = _quantized(matrix.to(device), spec, outputs.format)
        yield TensorRecord(name, value, layer, merged)
    report(Progress("quantize", len(outputs.specs), len(outputs.specs), "tensor"))


def _ahead(weights: WeightSource, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """The tensors in their order; the next one is read and merged in a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as reader:
        remaining = iter(names)
        pending = reader.submit(weights.read, next(remaining))
        for name in remaining:
            found = pending.result()
            pending = reader.submit(weights.read, name)
            yield found
            del found
        yield pending.result()


def _quantized(merged: torch.Tensor, spec: QuantizedSpec, method: Format) -> Quantized:
    if isinstance(spec, BlockQuantizedSpec):
        return bitsandbytes_4bit.quantize(merged, spec)
    return row_int8.w8a8(merged) if isinstance(method, W8A8Format) else row_int8.llm_int8(merged)


def _spec(linear: LinearSpec, dense: TensorSpec, settings: RoundingSettings) -> QuantizedSpec:
    if isinstance(settings, Nf4Settings):
        return BlockQuantizedSpec(
            linear.out_features,
            linear.in_features,
            settings.quant_type,
            settings.block_size,
            settings.double_quant,
            dense.dtype,
            linear.transposed,
        )
    return RowQuantizedSpec(linear.out_features, linear.in_features, dense.dtype, linear.transposed)


def _layer_method(method: Format) -> str:
    if isinstance(method, FourBitFormat):
        return method.quant_type
    return "w8a8" if isinstance(method, W8A8Format) else "int8"


def _kept(structure: Structure) -> Mapping[str, str]:
    return family(structure.model_type).keep_dense


def _any(patterns: list[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched(key: str, patterns: list[str], names: set[str]) -> list[str]:
    example = f", for example {min(names)}" if names else "; this family has none"
    what = "linear layer" if key == "skip_modules" else "linear layer that its family keeps dense"
    return [
        f"{key}: {pattern!r} matches no {what}{example}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
