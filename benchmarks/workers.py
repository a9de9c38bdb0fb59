"""GPTQ's pass over some blocks in one process and on workers of Ray: seconds a block, memory, and the same bytes. Then
the comparison of these blocks with themselves rounded to nearest: seconds, memory, and the same figures.

    OMP_NUM_THREADS=1 python benchmarks/workers.py --workers 0 1 2 --blocks 4

0 is this process. The first block is left out: starting the workers and their imports are in its time. Memory is that
of the kernel (VmHWM) beside what `qexport plan` says. Then a model of larger runs on GPUs, and of the measured one, is
printed; nothing of it was measured on GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qexport.architectures.architecture import Architecture
from qexport.architectures.memory import resident
from qexport.architectures.runner import BlockRunner
from qexport.execution import ExecutionSettings, execution_of
from qexport.execution.workers import Execution
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.texts import read_texts
from qexport.progress import Steps, silent
from qexport.quantizing.method import PassInputs
from qexport.quantizing.rounding import NearestSource
from qexport.recipe import Recipe, load_recipe
from qexport.tensors import GroupQuantizedSpec, TensorRecord
from qexport.verifying.rounds import Models, measure

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """What a pass and a comparison took.

    Attributes:
        seconds: of each block of the pass.
        digest: of all tensors.
        peak: of this process, bytes.
        compared: seconds of the comparison.
        figures: the digest of its figures.
        workers: the largest peak of a worker after the pass, and after the comparison.
        planned: of a worker, for the whole recipe.
    """

    seconds: list[float]
    digest: str
    peak: int
    compared: float
    figures: str
    workers: tuple[int, int]
    planned: int


def main() -> None:
    """Prints a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0 for this process")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/gptq-4bit.yaml")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.override)
    table = Table("workers", "s a block", "times one worker", "digest", "s compared", "figures", "peak MB of the run",
                  "of a worker: pass", "with comparison", "planned")  # fmt: skip
    alone: float | None = None
    for workers in arguments.workers:
        found = measured(recipe, workers, arguments.blocks)
        each = sum(found.seconds[1:]) / (arguments.blocks - 1)
        alone = each if workers == 1 else alone
        ratio = f"{alone / each:.2f}" if alone else ""
        sizes = (f"{size / 1e6:.0f}" for size in (found.peak, *found.workers, found.planned))
        table.add_row(str(workers), f"{each:.2f}", ratio, found.digest, f"{found.compared:.1f}", found.figures, *sizes)
    Console(width=160).print(table)
    show_model(alone)


@dataclass(frozen=True)
class Job:
    """A pass, a block of which is computed by several workers.

    Attributes:
        name: for the table.
        parameters: of a block's layers that each token goes through.
        stored: of all of a block's layers.
        squares: the sum of in^2 over its different inputs, those of experts left out.
        expert_squares: of the experts' inputs.
        tokens: of calibration.
        rate: flops a second of a worker.
        bandwidth: bytes a second into a worker, with all copies.
        serial: seconds that nobody else can work.
    """

    name: str
    parameters: float
    stored: float
    squares: float
    expert_squares: float
    tokens: float
    rate: float
    bandwidth: float
    serial: float

    def computing(self, workers: int) -> float:
        """Two forwards of 2 flops a parameter and token, H with one flop a value and token, D with two."""
        sums = self.tokens * (3 * self.squares + self.expert_squares * self.parameters / self.stored)
        return (4 * self.parameters * self.tokens + sums) / self.rate / workers

    def sending(self, workers: int) -> float:
        """Into a worker: the block twice in 16 bits, half of H and all of D, H and its factor; of experts half of H,
        and the whole of its share.
        """
        if workers == 1:
            return 0.0
        sums = 14 * self.squares + (2 + 4 / workers) * self.expert_squares
        return (4 * self.stored + sums) / self.bandwidth

    def seconds(self, workers: int) -> float:
        """Of a block."""
        return self.computing(workers) + self.sending(workers) + self.serial


H200, NETWORK = 250e12, 10e9
JOBS = (
    Job("7B (hidden 4096, MLP 11008)", 202e6, 202e6, 172e6, 0, 128 * 2048, H200, NETWORK, 0.2),
    Job("70B (hidden 8192, MLP 28672)", 856e6, 856e6, 1023e6, 0, 128 * 2048, H200, NETWORK, 0.5),
    Job("400B mixture (hidden 5120, 128 experts of 8192, one a token)", 300e6, 16.2e9, 52e6, 11.9e9, 128 * 2048,
        H200, NETWORK, 0.5),
)  # fmt: skip


def show_model(measured_seconds: float | None) -> None:
    """Prints seconds a block and the share of the time that is computing, for several numbers of workers."""
    table = Table("model of a block, s (share that computes)", *map(str, (1, 2, 4, 8, 64)))
    jobs = list(JOBS)
    if measured_seconds:  # SmolLM2 as it was measured with one worker
        whole = Job("SmolLM2-135M, these CPUs", 3.54e6, 3.54e6, 3.36e6, 0, 64 * 512, 1.0, 1e9, 0.3)
        rate = whole.computing(1) / (measured_seconds - whole.serial)
        jobs.insert(0, replace(whole, rate=rate))
    for job in jobs:
        each = (job.seconds(workers) for workers in (1, 2, 4, 8, 64))
        shares = (job.computing(workers) / job.seconds(workers) for workers in (1, 2, 4, 8, 64))
        table.add_row(job.name, *(f"{time_:.2f} ({share:.0%})" for time_, share in zip(each, shares, strict=True)))
    Console(width=140).print(table)


def measured(recipe: Recipe, workers: int, blocks: int) -> Measured:
    """One pass over the first blocks and one comparison, with one thread a worker."""
    torch.set_num_threads(1 if workers < 2 else workers)
    planned = plan(recipe.on_workers(workers) if workers else recipe)
    texts = read_texts(planned.recipe, planned.merged.checkpoint, planned.structure)
    settings = ExecutionSettings(workers=workers, threads=1) if workers else None
    with execution_of(settings, CPU) as execution, tempfile.TemporaryDirectory() as scratch:
        inputs = PassInputs(
            planned.merged.checkpoint, planned.outputs, texts.calibration,
            dtype=getattr(torch, planned.recipe.merge.dtype), device=CPU, scratch=Path(scratch), execution=execution,
        )  # fmt: skip
        digest, ends = hashlib.sha256(), [time.monotonic()]
        for record in planned.method.quantize(inputs):
            index = _block(record.name)
            if index is not None and index >= blocks:
                break
            if index is not None and index == len(ends) - 1:
                ends.append(time.monotonic())
            for tensor in _tensors(record):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        of_pass = max(execution.map(_peak, range(execution.workers)))
        start, figures = time.monotonic(), _compared(planned, execution, blocks)
        end, of_both = time.monotonic(), max(execution.map(_peak, range(execution.workers)))
    seconds = [after - before for before, after in pairwise(ends)]
    return Measured(
        seconds, digest.hexdigest()[:12], resident().peak, end - start, figures, (of_pass, of_both),
        planned.expected.worker or planned.expected.memory,
    )  # fmt: skip


def _peak(_: int) -> int:
    """Of the process in which this is called."""
    return resident().peak


def _compared(planned: Plan, execution: Execution, blocks: int) -> str:
    """The digest of the figures of the first blocks rounded to nearest, on the windows of the recipe's first look."""
    merged, settings = planned.merged.checkpoint, planned.recipe.verify
    assert settings is not None
    architecture = Architecture({**merged.config, "num_hidden_layers": blocks})
    ids = torch.randint(
        planned.structure.vocab_size, (settings.windows, settings.sequence_length),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    specs = planned.outputs.quantized.items()
    grids = {
        name: spec for name, spec in specs
        if isinstance(spec, GroupQuantizedSpec) and f"{name}.weight" in architecture.structure.parameters
    }  # fmt: skip
    dtype = getattr(torch, planned.recipe.merge.dtype)
    models = [
        BlockRunner(architecture, weights, dtype=dtype, device=CPU)
        for weights in (merged.weights, NearestSource(merged.weights, grids, frozenset()))
    ]
    found = measure(
        Models(models[0], models[1]), ids, settings.windows, lambda _: [], lambda *_: False, Steps(silent),
        execution=execution,
    )  # fmt: skip
    tokens = found.tokens()["artifact"]
    return hashlib.sha256(tokens.kl.numpy().tobytes() + repr(found.block_drift).encode()).hexdigest()[:12]


def _block(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _tensors(record: TensorRecord) -> Iterator[torch.Tensor]:
    values = [record.value] if isinstance(record.value, torch.Tensor) else vars(record.value).values()
    return (value for value in values if isinstance(value, torch.Tensor))


if __name__ == "__main__":
    main()
