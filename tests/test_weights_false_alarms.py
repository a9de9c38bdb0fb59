"""Codes straight from GPTQ's pass raise no alarm, whatever the sample of the calibration text; a step too high does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import factories
import trained_models
from qexport.architectures.architecture import Checkpoint
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import CalibrationSettings, PassInputs
from qexport.tensors import CalibrationSet, GroupQuantized
from qexport.verifying.matrices import compare_matrix

SEEDS = 20
VARIANTS: list[Mapping[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "sym": False},
    {"bits": 4, "desc_act": True, "static_groups": False},
    {"bits": 4, "group_size": -1, "mse": False},
    {"bits": 8},
    {"bits": 3, "static_groups": False},
    {"bits": 2},
]
"""The seeds take them in turns."""


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = factories.save(trained_models.trained_falcon(), tmp_path_factory.mktemp("falcon"))
    return load_checkpoint(LoadSettings(base=str(folder)))


def quantized(
    checkpoint: Checkpoint, seed: int, settings: Mapping[str, Any], scratch: Path
) -> Iterator[tuple[str, GroupQuantized]]:
    calibration = CalibrationSettings(source="-", seed=seed)
    method = Gptq.model_validate({"group_size": 32, "calibration": calibration} | dict(settings))
    text = torch.tensor(trained_models.ids(seed=100 + seed)[: 16 * trained_models.WINDOW])
    inputs = PassInputs(
        checkpoint,
        method.plan(checkpoint),
        CalibrationSet(text.reshape(16, -1), sha256="", origin="passages"),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        scratch=scratch,
    )
    for record in method.quantize(inputs):
        if isinstance(record.value, GroupQuantized):
            yield record.name, record.value


def test_no_sample_of_the_calibration_text_raises_an_alarm_in_a_falcon(falcon: Checkpoint, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        for name, codes in quantized(falcon, seed, VARIANTS[seed % len(VARIANTS)], tmp_path):
            found = compare_matrix(codes, falcon.weights.read(name))
            assert found.faults == [], (seed, name)
            assert max(found.used.values()) < 0.85, (seed, name, found.used)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("step", [1, -1])
def test_zero_points_that_are_off_by_one_are_named(falcon: Checkpoint, tmp_path: Path, bits: int, step: int) -> None:
    """What readers make of a file that stores them in the other of the two conventions."""
    for name, codes in quantized(falcon, 0, {"bits": bits, "mse": False}, tmp_path):
        assert "shift" not in {limit for limit, used in _used(codes, falcon, name).items() if used > 0.7}
        off = replace(codes, zeros=codes.zeros + step)
        assert _used(off, falcon, name)["shift"] > 1.3
        texts = [fault.text for fault in compare_matrix(off, falcon.weights.read(name)).faults]
        assert any(("smaller" if step > 0 else "larger") in text and "off by one" in text for text in texts), texts


def _used(codes: GroupQuantized, checkpoint: Checkpoint, name: str) -> Mapping[str, float]:
    return compare_matrix(codes, checkpoint.weights.read(name)).used
