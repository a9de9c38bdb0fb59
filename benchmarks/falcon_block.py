"""GPTQ of one decoder block with the shapes of Falcon-7B: wall seconds, processor seconds and peak memory.

Hidden size 4544 (71 heads of 64, multi-query), MLP 18176, groups of 64, 4,096 calibration tokens, random weights. The
Hessian of the MLP's second layer alone is 1.3 GB in float32: the largest factorization that this model asks for.

    python benchmarks/falcon_block.py
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from transformers import FalconConfig

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import CalibrationSettings, PassInputs
from qexport.records import LayerRecord
from qexport.tensors import CalibrationSet, Origin, TensorSpec

WINDOWS, LENGTH, VOCABULARY = 8, 512, 1024


class RandomWeights:
    """Weights that are made when they are read, the same ones every time."""

    def __init__(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        self._specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in parameters.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """The shapes of the model, in bfloat16."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """Normal values; norms around one."""
        spec = self._specs[name]
        seed = list(self._specs).index(name)
        values = torch.empty(spec.shape, dtype=spec.dtype).normal_(
            0, 0.02, generator=torch.Generator().manual_seed(seed)
        )
        return values if len(spec.shape) > 1 else values.add_(1)


def main() -> None:
    """Runs the block and shows what it took."""
    config = FalconConfig(
        hidden_size=4544,
        num_attention_heads=71,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
    )
    content = json.loads(config.to_json_string())
    architecture = Architecture(content)
    checkpoint = Checkpoint(
        architecture, RandomWeights(architecture.structure.parameters), {}, Origin("folder", "falcon-block")
    )
    tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    settings = Gptq(method="gptq", bits=4, group_size=64, calibration=CalibrationSettings(source="-"))
    started, before = time.perf_counter(), _cpu_seconds()
    layers: list[LayerRecord] = []
    with tempfile.TemporaryDirectory() as scratch:
        inputs = PassInputs(
            checkpoint,
            settings.plan(checkpoint),
            CalibrationSet(tokens, sha256="", origin="random"),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            scratch=Path(scratch),
        )
        stream = settings.quantize(inputs)
        layers = [record.layer for record in stream if record.layer]
    wall, cpu = time.perf_counter() - started, _cpu_seconds() - before
    _show(layers, wall, cpu)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _show(layers: list[LayerRecord], wall: float, cpu: float) -> None:
    table = Table("layer", "loss", "round-to-nearest", "damping")
    for layer in layers:
        table.add_row(layer.name, f"{layer.loss:.5f}", f"{layer.rtn_loss:.5f}", f"{layer.damp_percent:g}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    console = Console()
    console.print(table)
    console.print(f"{wall:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB, {WINDOWS * LENGTH} tokens")


if __name__ == "__main__":
    main()
