"""What a run is expected to take of memory, time and disk, from headers and shapes alone.

Memory is that of the CPU's main memory: a fixed part, and the largest of the stages' needs. Time is counted in
operations, whose cost was measured on one machine and is scaled by a short measurement of this one. Constants are in
bytes, or in nanoseconds of processor time on that machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import torch

from qexport.amounts import duration, parse_size, size
from qexport.architectures.memory import Budget
from qexport.architectures.structure import LinearSpec
from qexport.errors import ResourceError
from qexport.formats import Outputs
from qexport.merge.merging import Merged
from qexport.quantizing.factorization import single_thread
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.gptq_pass import HESSIAN_BYTES
from qexport.recipe import Recipe
from qexport.tensors import GroupQuantizedSpec
from qexport.text.prompts import read_prompts
from qexport.verifying import VerifySettings
from qexport.verifying.divergence import DOUBLES_AT_ONCE
from qexport.verifying.memory import HEADROOM, total_memory
from qexport.verifying.predictors import BATCH_TOKENS, TOKENS_AT_ONCE
from qexport.verifying.prompt_batches import ROWS
from qexport.verifying.verification import has_nearest_rival

_FIXED: Final = 425e6
"""The process before any weight: Python, torch, transformers, and the plan."""

_GAPS: Final = 1.08
"""What malloc keeps between tensors of many sizes."""

_STATISTICS: Final = 30e6
"""What verification imports."""

_GENERATION: Final = 75e6
"""The same, and what transformers imports to continue prompts."""

_SQUARES: Final = 2
"""Matrices [in, in] in float32 while a Hessian is factorized: itself, and the copy that becomes its factor."""

_SOLVED: Final = 3
"""Matrices [out, in] in float32 while codes are found: the weights, the columns, and what is measured of them."""

_ROUNDED: Final = 4
"""The same while a matrix is rounded, or codes become weights again."""

_PREPARED: Final = 1024
"""Tokens on which the noise floor and the merge are measured."""

_PROMPT_TOKENS: Final = 64
"""Tokens of a prompt, roughly; they are not counted, since the tokenizer is not opened."""

_LOGITS: Final = 3
"""Copies of the logits of a batch's new tokens while they are checked."""

_REPORT: Final = 400e3
"""Report and manifest of a layout, without what grows with layers and prompts."""

_REPORT_OF_LAYER: Final = 1200
"""The same for each quantized layer."""

_GIGAFLOPS: Final = 54.0
"""Float32 operations per nanosecond of one core, in the products of a model, where `_speed` gives `_MEASURED`."""

_MEASURED: Final = 69.0
"""Operations per nanosecond that `_speed` found on the machine on which the constants were measured."""

_SIDE: Final = 1024
"""Rows and columns of the matrices that `_speed` multiplies."""

_START: Final = 12e9
"""Imports, building the model on the meta device, reading texts, and writing the report."""

_SEARCHED: Final = 46.0
"""Clipping ranges of a weight in GPTQ."""

_STEPPED: Final = 48.0
"""Grids, codes and errors of a weight, column by column on one thread."""

_CODED: Final = 5.0
"""Rounding a weight, or making it from its code."""

_READ: Final = 3.4
"""Reading, checking and hashing a byte of the base."""

_WRITTEN: Final = 11.0
"""Writing, hashing and reading back a byte of the artifact."""

_COMPARED: Final = 6.0
"""Comparing two logits in float64."""

_STREAMED: Final = 0.2
"""Reading a byte of the weights from memory for one new token of a batch."""

_STEP: Final = 1e6
"""One block's calls for one new token of a batch of prompts."""

_PASSES: Final = 8
"""Passes over the blocks until prompts are continued by a model that does not fit in memory."""


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
    """

    memory: int
    stages: Mapping[str, int]
    cpu_seconds: float
    seconds: float
    disk: int
    budget: Budget

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "memory": self.memory,
            "memory_by_stage": dict(self.stages),
            "cpu_seconds": round(self.cpu_seconds),
            "seconds": round(self.seconds),
            "disk": self.disk,
        }

    def line(self) -> str:
        """The figures for the terminal."""
        most = max(self.stages, key=lambda name: self.stages[name])
        return (
            f"{size(self.memory, decimals=1)} of memory ({most}), {size(self.disk, decimals=1)} of disk, "
            f"{duration(self.seconds)} on this machine's CPU ({duration(self.cpu_seconds)} of processor time)"
        )

    def refuse_beyond(self, max_memory: str | None) -> None:
        """Refuses a run that needs more memory than the recipe allows, or than the machine has.

        Raises:
            ResourceError: it does.
        """
        limit = total_memory() if max_memory is None else parse_size(max_memory)
        if self.memory <= limit:
            return
        needed, most = size(self.memory, decimals=1), max(self.stages, key=lambda name: self.stages[name])
        allowed = "this machine has" if max_memory is None else "max_memory allows"
        raise ResourceError(
            f"the run needs about {needed} of memory, {allowed} {size(limit, decimals=1)}",
            where=f"the stage {most}, in which it needs most",
            mend=f"allow {needed}, or choose another method: those without calibration need no Hessians",
        )


def expect(recipe: Recipe, merged: Merged, outputs: Outputs, artifact: int) -> Expected:
    """What a run will take.

    Args:
        recipe: the recipe.
        merged: the merged model.
        outputs: what quantizing will yield.
        artifact: bytes of all tensors on disk.
    """
    limit = float(total_memory() if recipe.max_memory is None else parse_size(recipe.max_memory))
    model = _Model(merged, outputs, recipe)
    for share in (math.inf, 0.5, 0.25, 0.0):
        chosen = Budget(limit, share * HESSIAN_BYTES, share * BATCH_TOKENS) if share < 1 else Budget(limit)
        stages = {name: round(_FIXED + _GAPS * need) for name, need in _memory(model, chosen).items()}
        if max(stages.values()) <= limit:
            break
    work = _work(model, artifact, whole="prompts" in stages)
    scale = _MEASURED / _speed() / 1e9
    threads = torch.get_num_threads()
    return Expected(
        memory=max(stages.values()),
        stages=stages,
        cpu_seconds=scale * (work.shared + work.single),
        seconds=scale * (work.shared / threads + work.single),
        disk=round(artifact + len(recipe.export) * _beside(model, merged) + _parked(model)),
        budget=chosen,
    )


class _Model:
    """The sizes that memory and time depend on; `bytes_` is that of a value in the merged model's dtype."""

    def __init__(self, merged: Merged, outputs: Outputs, recipe: Recipe) -> None:
        self.recipe, self.outputs, self.verify = recipe, outputs, recipe.verify
        self.adapter, self.method = merged.adapter, recipe.quantize
        self.structure = structure = merged.checkpoint.architecture.structure
        self.bytes_ = int(getattr(torch, recipe.merge.dtype).itemsize)
        self.counts = {name: math.prod(shape) for name, shape in structure.parameters.items()}
        self.vocabulary, self.hidden = structure.parameters[f"{structure.embedding}.weight"]
        self.head = self.vocabulary * self.hidden
        self.total = sum(self.counts.values())
        self.blocks = {block: self._in(block) for block in structure.blocks}
        self.block = max(self.blocks.values())
        self.linears = structure.linears[max(self.blocks, key=lambda name: self.blocks[name])]
        config = merged.checkpoint.architecture.parsed
        experts, used = (getattr(config, name, None) for name in ("num_local_experts", "num_experts_per_tok"))
        self.experts = experts or getattr(config, "num_experts", None) or 1
        self.share = (used or 1) / self.experts if self.experts > 1 else 1.0

    def _in(self, block: str) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith(f"{block}."))

    @cached_property
    def prompts(self) -> int:
        """Prompts to continue."""
        path = self.verify.prompts if self.verify else None
        return len(read_prompts(Path(path)).prompts) if path else 0

    @property
    def whole(self) -> int:
        """Bytes of a whole model with its head in float32."""
        return self.total * self.bytes_ + 4 * self.head

    def fits(self, limit: float) -> bool:
        """Whether there are prompts, and a whole model to continue them fits."""
        return self.prompts > 0 and _FIXED + _GENERATION + HEADROOM * self.whole <= limit

    @cached_property
    def widest(self) -> int:
        """Values of a block's largest matrix."""
        return max(linear.out_features * linear.in_features for linear in self.linears)

    @cached_property
    def active(self) -> float:
        """Weights of all blocks that a token is multiplied with."""
        routed = sum(linear.out_features * linear.in_features for linear in self.linears if linear.expert)
        return sum(self.blocks.values()) - routed * (1 - self.share) * len(self.blocks)

    @cached_property
    def working(self) -> float:
        """Bytes of one token's values inside a block's forward: its widest layer's inputs and outputs, in each of the
        experts that it is sent to.
        """
        outs = max(self._sharing(linear) for linear in self.linears)
        routed = max(1.0, self.share * self.experts)
        return routed * (2 * self.bytes_ * outs + 4 * max(linear.in_features for linear in self.linears))

    def _sharing(self, linear: LinearSpec) -> int:
        """Outputs of the layers that may have the same input as this one."""
        if linear.expert:
            return 2 * linear.out_features
        return sum(
            other.out_features for other in self.linears if other.in_features == linear.in_features and not other.expert
        )

    @cached_property
    def calibration(self) -> int:
        """Calibration tokens."""
        settings = self.method.calibration_settings
        return settings.samples * settings.sequence_length if settings else 0

    def logits(self, models: int) -> float:
        """Bytes of a piece of the logits of some models, and of what is computed from them in float64."""
        values = TOKENS_AT_ONCE * self.vocabulary
        return models * 4 * values + 2 * (models + 1) * 8 * min(values, DOUBLES_AT_ONCE)

    @property
    def quantized(self) -> int:
        """Weights that are quantized."""
        return sum(math.prod(spec.shape) for spec in self.outputs.quantized.values())

    @property
    def compared(self) -> int:
        """Models that run side by side: reference, artifact, and the rivals that apply."""
        grids = {name: spec for name, spec in self.outputs.quantized.items() if isinstance(spec, GroupQuantizedSpec)}
        return 2 + has_nearest_rival(grids) + (self.adapter is not None)


def _memory(model: _Model, chosen: Budget) -> dict[str, float]:
    """Bytes of each stage beyond the fixed part."""
    needs = {"quantize": _quantizing(model, chosen)}
    if model.verify is not None:
        needs |= {"prepare": _preparing(model), "verify": _verifying(model, model.verify, chosen)}
        if model.fits(chosen.limit):
            needs["prompts"] = _continuing(model, model.verify)
    return needs


def _quantizing(model: _Model, chosen: Budget) -> float:
    """For GPTQ: the block, what the paused forwards keep, and the largest factorization or solution."""
    tensor = model.bytes_ * max(model.counts.values())
    if not isinstance(model.method, Gptq):
        return 1.3 * tensor + _ROUNDED * 4 * model.widest
    kept = model.calibration * model.bytes_ * 3 * model.hidden
    solved = 0.0
    for linear in model.linears:
        square, weights = 4 * linear.in_features**2, 4 * linear.in_features * model._sharing(linear)
        together = min(min(HESSIAN_BYTES, chosen.expert_hessians) - square, (model.experts - 1) * square)
        others = max(0.0, together) if linear.expert else 0.0
        solved = max(solved, others + weights + max(_SQUARES * square, 2 * square + (_SOLVED - 1) * weights))
    return max(tensor, model.block * model.bytes_ + solved) + kept


def _preparing(model: _Model) -> float:
    """Two models compared, in two dtypes or as the merge and its proof: one head after the other, the second beside the
    logits of the first model.
    """
    tokens = _PREPARED
    wide = 8 if model.bytes_ == 4 else 4
    hidden = tokens * model.hidden * (model.bytes_ + wide)
    block = model.block * wide + 4 * model.widest + tokens * 2 * model.working
    head = max(model.head * (model.bytes_ + wide), wide * model.head + model.logits(2))
    return _STATISTICS + hidden + max(block, head + 4 * tokens * model.vocabulary)


def _verifying(model: _Model, settings: VerifySettings, chosen: Budget) -> float:
    """The hidden states of all models, one block, and at the end the head: two are compared with each other to find out
    whether one is enough, then that one is widened to float32, and then there are pieces of all logits.
    """
    tokens = settings.sequence_length * max(1, min(settings.windows, settings.max_windows))
    at_once = min(tokens, max(settings.sequence_length, min(BATCH_TOKENS, chosen.compared_tokens)))
    hidden = model.compared * tokens * model.hidden * model.bytes_
    block = model.block * model.bytes_ + _ROUNDED * 4 * model.widest + at_once * model.working
    heads = 2 if model.structure.head in model.outputs.quantized else 1
    read = model.head * (4 * heads + model.bytes_)
    return _STATISTICS + hidden + max(block, read, 4 * heads * model.head + model.logits(model.compared))


def _continuing(model: _Model, settings: VerifySettings) -> float:
    """A whole model with its head in float32, and the logits of a batch of prompts."""
    logits = min(model.prompts, ROWS) * settings.max_new_tokens * 4 * model.vocabulary
    return _GENERATION + model.whole + _LOGITS * logits


def _parked(model: _Model) -> float:
    """The inputs of a block's groups and its hidden states, for each pause, and two files of hidden states from which a
    run goes on; nothing without calibration.
    """
    inputs = dict.fromkeys((linear.in_features, linear.expert) for linear in model.linears)
    used = model.experts * model.share
    values = sum(width * (used if expert else 1) + model.hidden for width, expert in inputs)
    return model.calibration * model.bytes_ * (values + 2 * model.hidden)


def _beside(model: _Model, merged: Merged) -> float:
    """Bytes of a layout's other files: tokenizer, manifest, report."""
    tokenizer = sum(map(len, merged.checkpoint.files.values()))
    return tokenizer + _REPORT_OF_LAYER * len(model.outputs.quantized) + (_REPORT if model.verify else 0)


@dataclass
class _Work:
    """Nanoseconds of processor time on the machine of the constants: what all threads share, and what one does."""

    shared: float = 0.0
    single: float = 0.0

    def products(self, flops: float) -> None:
        """Matrix products."""
        self.shared += flops / _GIGAFLOPS


def _work(model: _Model, artifact: int, *, whole: bool) -> _Work:
    work = _Work(single=_START + artifact * _WRITTEN + model.total * model.bytes_ * _READ)
    if isinstance(model.method, Gptq):
        _gptq_work(model, work)
    else:
        work.shared += model.quantized * _CODED
    if model.verify is not None:
        _verify_work(model, model.verify, work, whole=whole)
    return work


def _gptq_work(model: _Model, work: _Work) -> None:
    tokens, blocks = model.calibration, len(model.blocks)
    work.products(2 * tokens * model.active + 4 * tokens * 512 * model.hidden * blocks)
    for linear in model.linears:
        square = linear.in_features**2
        used = model.share if linear.expert else 1.0
        work.products(blocks * square * (used * tokens + 4 * linear.out_features + 0.6 * linear.in_features))
        work.single += blocks * square * linear.out_features / _GIGAFLOPS
    work.shared += model.quantized * _SEARCHED
    work.single += model.quantized * _STEPPED


def _verify_work(model: _Model, settings: VerifySettings, work: _Work, *, whole: bool) -> None:
    tokens = settings.sequence_length * min(settings.windows, settings.max_windows)
    rivals = min(tokens, 16 * settings.sequence_length)
    runs = 2 * tokens + (model.compared - 2) * rivals + (6 if model.adapter else 2) * _PREPARED
    work.products(2 * runs * (model.active + model.head))
    work.shared += _COMPARED * model.vocabulary * (tokens + 2 * (model.compared - 2) * rivals)
    work.single += (model.compared + 2) * model.total * (model.bytes_ * _READ + _CODED)
    passes = 1 if whole else _PASSES
    forwards = 2 * passes * model.prompts * (_PROMPT_TOKENS + 2 * settings.max_new_tokens)
    work.products(2 * forwards * (model.active + model.head))
    steps = 2 * math.ceil(model.prompts / ROWS) * settings.max_new_tokens
    work.shared += steps * (len(model.blocks) * _STEP + model.whole * _STREAMED) if whole else 0.0
    work.single += 0.0 if whole else 2 * passes * model.total * (model.bytes_ * _READ + _CODED)


@cache
def _speed() -> float:
    """Operations per nanosecond of one thread's processor time in a product of matrices.

    The first call takes an eighth of a second. Processor time, since other programs may be running; the best of some
    tries, for the same reason.
    """
    matrix, found = torch.ones(_SIDE, _SIDE), 0.0
    with single_thread():
        for _ in range(3):
            started = time.thread_time_ns()
            matrix @ matrix
            found = max(found, 2 * _SIDE**3 / max(1, time.thread_time_ns() - started))
    return found
