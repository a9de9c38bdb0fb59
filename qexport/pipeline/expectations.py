"""What a run is expected to take of memory, time and disk, from headers and shapes alone.

Memory is that of the CPU's main memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qexport.amounts import duration, parse_size, size
from qexport.architectures.machine_memory import total_memory
from qexport.architectures.memory import Budget
from qexport.errors import ResourceError
from qexport.formats import Outputs
from qexport.merge.merging import Merged
from qexport.pipeline.expected_memory import choose_budget, memory_of_worker
from qexport.pipeline.expected_sizes import RunSizes
from qexport.pipeline.expected_time import processor_time
from qexport.quantizing.importance import AT_A_TIME
from qexport.reading.stored_model import StoredModel
from qexport.recipe import Recipe
from qexport.tensors import GroupQuantizedSpec
from qexport.verifying import VerifySettings

_REPORT: Final = 400e3
"""Report and manifest of a layout, without what grows with layers and prompts."""

_BESIDE_INPUTS: Final = 5
"""Hidden states, queries, keys and values that a stopped forward holds beside the inputs of the block's groups."""

_REPORT_OF_LAYER: Final = 1200
"""The same for each quantized layer."""


@dataclass(frozen=True)
class Expected:
    """What a run is expected to take.

    Attributes:
        memory: bytes of main memory at the peak, on a CPU.
        stages: the same for each stage.
        cpu_seconds: processor seconds of all threads, with the windows of the first look at the gates.
        seconds: wall seconds, if nothing else runs.
        disk: bytes at the peak: the artifact with its reports, and parked activations.
        budget: what the parts of the run keep to.
        worker: bytes of main memory of each worker at the peak; None without workers.
    """

    memory: int
    stages: Mapping[str, int]
    cpu_seconds: float
    seconds: float
    disk: int
    budget: Budget
    worker: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "memory": self.memory,
            "memory_by_stage": dict(self.stages),
            "cpu_seconds": round(self.cpu_seconds),
            "seconds": round(self.seconds),
            "disk": self.disk,
        } | ({} if self.worker is None else {"memory_of_worker": self.worker})

    def line(self) -> str:
        """The figures for the terminal."""
        most = max(self.stages, key=lambda name: self.stages[name])
        return (
            f"{size(self.memory, decimals=1)} of memory ({most}), {size(self.disk, decimals=1)} of disk, "
            f"{duration(self.seconds)} on this machine's CPU ({duration(self.cpu_seconds)} of processor time)"
            + ("" if self.worker is None else f"; {size(self.worker, decimals=1)} of memory for each worker")
        )

    def refuse_beyond(self, max_memory: str | None) -> None:
        """Refuses a run that needs more memory than the recipe allows, or than the machine has.

        Raises:
            ResourceError: it does.
        """
        _refuse_beyond(
            self.stages, max_memory, "the run", "choose another method: those without calibration need no Hessians"
        )


def expect(recipe: Recipe, merged: Merged, outputs: Outputs, artifact: int) -> Expected:
    """What a run will take.

    Args:
        recipe: the recipe.
        merged: the merged model.
        outputs: what quantizing will yield.
        artifact: bytes of all tensors on disk.
    """
    sizes = RunSizes(
        merged,
        getattr(torch, recipe.merge.dtype),
        {name: spec.shape for name, spec in outputs.quantized.items()},
        {name: spec for name, spec in outputs.quantized.items() if isinstance(spec, GroupQuantizedSpec)},
        method=recipe.quantize,
        verify=recipe.verify,
    )
    chosen, stages = choose_budget(sizes, _allowed(recipe.max_memory))
    shared, single = processor_time(sizes, artifact, whole="prompts" in stages)
    before = _before_blocks(sizes, recipe.execution.workers if recipe.execution else 1)
    return Expected(
        memory=max(stages.values()),
        stages=stages,
        cpu_seconds=shared + single,
        seconds=shared / torch.get_num_threads() + single,
        disk=round(artifact + len(recipe.export) * _beside(sizes, merged) + max(_parked(sizes), before)),
        budget=chosen,
        worker=memory_of_worker(sizes, recipe.execution.workers, chosen) if recipe.execution else None,
    )


def budget_to_verify(
    merged: Merged,
    artifact: StoredModel,
    settings: VerifySettings,
    max_memory: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Budget:
    """What the verification of a finished folder keeps to.

    Args:
        merged: the merged model.
        artifact: the folder.
        settings: how they are compared.
        max_memory: the most main memory that the process may take; None for what the machine has.
        dtype: the merged model's.
        device: where to compute.

    Raises:
        ResourceError: on a CPU, it needs more.
    """
    shapes = {name: layer.shape for name, layer in artifact.layers.items()}
    sizes = RunSizes(merged, dtype, shapes, artifact.grids, method=None, verify=settings)
    chosen, stages = choose_budget(sizes, _allowed(max_memory))
    if device.type == "cpu":
        _refuse_beyond(stages, max_memory, "the verification", "measure fewer or shorter windows")
    return chosen


def _allowed(max_memory: str | None) -> float:
    """Bytes that the process may take."""
    return total_memory() if max_memory is None else parse_size(max_memory)


def _refuse_beyond(stages: Mapping[str, int], max_memory: str | None, what: str, otherwise: str) -> None:
    limit, most = _allowed(max_memory), max(stages, key=lambda name: stages[name])
    if stages[most] <= limit:
        return
    needed = size(stages[most], decimals=1)
    allowed = "this machine has" if max_memory is None else "max_memory allows"
    raise ResourceError(
        f"{what} needs about {needed} of memory, {allowed} {size(limit, decimals=1)}",
        where=f"the stage {most}, in which it needs most",
        mend=f"allow {needed}, or {otherwise}",
    )


def _parked(sizes: RunSizes) -> float:
    """What a block's forwards hold when they stop, above all the inputs of its groups, of which all but experts' are
    there once more in full precision; and two files of the hidden states between blocks. Nothing without calibration.
    """
    inputs = dict.fromkeys((linear.in_features, linear.expert) for linear in sizes.linears)
    used = sizes.experts * sizes.share
    values = sum(width * (used if expert else 1) for width, expert in inputs) + _BESIDE_INPUTS * sizes.hidden
    if sizes.streams == 2:
        values += sum(width for width, expert in inputs if not expert)
    return sizes.calibration * sizes.bytes_ * (values + 2 * sizes.streams * sizes.hidden)


def _before_blocks(sizes: RunSizes, workers: int) -> float:
    """The hidden states before every block, while the importance of tokens is measured."""
    if not sizes.high_effort:
        return 0.0
    return min(sizes.calibration, workers * AT_A_TIME) * sizes.hidden * sizes.bytes_ * len(sizes.blocks)


def _beside(sizes: RunSizes, merged: Merged) -> float:
    """Bytes of a layout's other files: tokenizer, manifest, report."""
    tokenizer = sum(map(len, merged.checkpoint.files.values()))
    return tokenizer + _REPORT_OF_LAYER * len(sizes.quantized) + (_REPORT if sizes.verify else 0)
