"""The time that a run is expected to take.

Operations are counted; their cost was measured on one machine and is scaled by a short measurement of this one.
Constants are in nanoseconds of processor time on that machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from qexport.architectures.devices import single_thread
from qexport.pipeline.expected_memory import PREPARED
from qexport.pipeline.expected_sizes import RunSizes
from qexport.quantizing.mixed import Mixed
from qexport.verifying import VerifySettings
from qexport.verifying.prompt_batches import ROWS

_GIGAFLOPS: Final = 54.0
"""Float32 operations per nanosecond of one core, in the products of a model, where `_speed` gives `_MEASURED`."""

_MEASURED: Final = 69.0
"""Operations per nanosecond that `_speed` found on the machine on which the constants were measured."""

_SIDE: Final = 1024
"""Rows and columns of the matrices that `_speed` multiplies."""

_START: Final = 12e9
"""Imports, building the model on the meta device, reading texts, and writing the report."""

_SEARCHED: Final = 24.0
"""Clipping ranges of a weight in GPTQ."""

_FITTED: Final = 1.2e6
"""The calls that search the clipping ranges of a group of inputs, whatever the number of outputs."""

_STEPPED: Final = 48.0
"""Grids, codes and errors of a weight, column by column on one thread."""

_CODED: Final = 5.0
"""Rounding a weight, or making it from its code."""

_MULTIPLIED: Final = 0.6
"""Multiplying a weight's gradient by its change."""

_READ: Final = 3.4
"""Reading, checking and hashing a byte of the base."""

_RECODED: Final = 9.0
"""Finding the codes that a weight of the base had in training, and dequantizing them."""

_WRITTEN: Final = 11.0
"""Writing, hashing and reading back a byte of the artifact."""

_HELD: Final = 15.0
"""Holding a weight of the artifact against the reference's."""

_COMPARED: Final = 6.0
"""Comparing two logits in float64."""

_STREAMED: Final = 0.2
"""Reading a byte of the weights from memory for one new token of a batch."""

_STEP: Final = 1e6
"""One block's calls for one new token of a batch of prompts."""

_PASSES: Final = 8
"""Passes over the blocks until prompts are continued by a model that does not fit in memory."""


@dataclass
class _Work:
    """Nanoseconds of processor time on the machine of the constants: what all threads share, and what one does."""

    shared: float = 0.0
    single: float = 0.0

    def products(self, flops: float) -> None:
        """Matrix products."""
        self.shared += flops / _GIGAFLOPS


def processor_time(sizes: RunSizes, artifact: int, *, whole: bool) -> tuple[float, float]:
    """Seconds of processor time on this machine: what all threads share, and what one does.

    Args:
        sizes: of the run.
        artifact: bytes of all tensors on disk.
        whole: whether prompts are continued by whole models.
    """
    work, scale = _work(sizes, artifact, whole=whole), _MEASURED / _speed() / 1e9
    return scale * work.shared, scale * work.single


def _work(sizes: RunSizes, artifact: int, *, whole: bool) -> _Work:
    base = sizes.total * sizes.bytes_ * _READ + sizes.recoded * _RECODED
    work = _Work(single=_START + artifact * _WRITTEN + base)
    if sizes.gptq is not None:
        _gptq_work(sizes, work)
    else:
        work.shared += sizes.coded * _CODED
    if isinstance(sizes.method, Mixed):
        _choosing_work(sizes, sizes.method, work)
    if sizes.verify is not None:
        _verify_work(sizes, sizes.verify, work, whole=whole)
    return work


def _gptq_work(sizes: RunSizes, work: _Work) -> None:
    tokens, blocks = sizes.calibration, len(sizes.blocks)
    work.products(sizes.streams * (2 * tokens * sizes.active + 4 * tokens * 512 * sizes.hidden * blocks))
    for linear in sizes.linears:
        square = linear.in_features**2
        used = sizes.share if linear.expert else 1.0
        if sizes.streams == 2 and not linear.expert:
            work.products(blocks * square * (tokens + 4 * linear.out_features))
        work.products(blocks * square * (used * tokens + 4 * linear.out_features + 0.6 * linear.in_features))
        work.single += blocks * square * linear.out_features / _GIGAFLOPS
    work.shared += sizes.coded * _SEARCHED + sum(grid.groups for grid in sizes.grids.values()) * _FITTED
    work.single += sizes.coded * _STEPPED
    if sizes.high_effort:
        _effort_work(sizes, work)


def _effort_work(sizes: RunSizes, work: _Work) -> None:
    """Forward twice, back once without gradients of the weights; then all codes twice and all scales once more."""
    work.products(2 * sizes.calibration * (3 * sizes.active + 2 * sizes.head))
    work.single += 2 * sizes.total * sizes.bytes_ * _READ
    for linear in sizes.linears:
        work.products(8 * len(sizes.blocks) * linear.out_features * linear.in_features**2)
    work.shared += 2 * sizes.coded * _STEPPED


def _choosing_work(sizes: RunSizes, method: Mixed, work: _Work) -> None:
    """Forward twice, back once with gradients of the weights, their products with each option's change, and the codes
    of each option.
    """
    options = sum(bits < 16 for bits in method.bits) * len(method.group_sizes)
    work.products(2 * method.windows * method.window_tokens * (8 * sizes.active + 3 * sizes.head))
    work.single += sizes.coded * options * (method.windows * _MULTIPLIED + _STEPPED)
    work.shared += sizes.coded * options * (_SEARCHED + _CODED)
    for linear in sizes.linears:
        work.products(0.6 * len(sizes.blocks) * linear.in_features**3)
    work.single += 2 * sizes.total * sizes.bytes_ * _READ


def _verify_work(sizes: RunSizes, settings: VerifySettings, work: _Work, *, whole: bool) -> None:
    tokens = settings.sequence_length * min(settings.windows, settings.max_windows)
    rivals = min(tokens, 16 * settings.sequence_length)
    runs = 2 * tokens + (sizes.compared - 2) * rivals + (6 if sizes.adapter else 2) * PREPARED
    work.products(2 * runs * (sizes.active + sizes.head))
    work.shared += _COMPARED * sizes.vocabulary * (tokens + 2 * (sizes.compared - 2) * rivals)
    model = sizes.total * (sizes.bytes_ * _READ + _CODED) + sizes.recoded * _RECODED  # read once, from its codes
    work.single += (sizes.compared + 2) * model + sizes.total * _HELD
    passes = 1 if whole else _PASSES
    forwards = 2 * passes * sum(each.prompts * (each.tokens + 2 * each.new_tokens) for each in sizes.continued)
    along = settings.length_windows * sum(sizes.lengths) + sum(each.along for each in sizes.continued)
    served = sizes.runtimes * tokens
    work.products(2 * (forwards + 2 * along + 3 * served) * (sizes.active + sizes.head))
    work.shared += _COMPARED * sizes.vocabulary * (2 * along + 3 * served)
    work.single += 3 * sizes.runtimes * model  # the reference, our reading and the runtime
    steps = 2 * sum(math.ceil(each.prompts / ROWS) * each.new_tokens for each in sizes.continued)
    work.shared += steps * (len(sizes.blocks) * _STEP + sizes.whole * _STREAMED) if whole else 0.0
    work.single += 0.0 if whole else 2 * passes * model


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
