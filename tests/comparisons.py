"""A verification with all rivals and three looks, and all that it finds, to compare it with another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import factories
from qexport.artifact.figures import Figure, GateResult
from qexport.execution.workers import Execution
from qexport.progress import ProgressCallback, silent
from qexport.reading.stored_model import open_stored
from qexport.tensors import Origin
from qexport.verifying import predictors
from qexport.verifying.verification import Measurement, verify
from quantized_models import QuantizedModel
from test_verify_verification import reference_of

WINDOW = 32


def one_window_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven windows are seven batches."""
    monkeypatch.setattr(predictors, "BATCH_TOKENS", WINDOW)


def written(model: QuantizedModel, folder: Path) -> QuantizedModel:
    model.write(folder)
    return model


def compared(
    model: QuantizedModel, folder: Path, execution: Execution, *, progress: ProgressCallback = silent, **changes: Any
) -> Measurement:
    """Looks at three, six and seven windows, with the model rounded to nearest and another model as the base."""
    other = QuantizedModel(factories.build(model.model.config, seed=5))
    reference = replace(
        reference_of(model.checkpoint, windows=3), base=other.checkpoint, adapter=Origin("folder", "adapter"), **changes
    )

    def undecided(figures: Sequence[Figure]) -> list[GateResult]:
        names = ("mean_kl", "kl_over_rtn", "kl_over_base")
        return [GateResult(name=name, figure=name, limit=0.1, value=0.5, low=0.0, high=1.0, n=4, unit="window",
                           verdict="undecided", reason="so") for name in names]  # fmt: skip

    with open_stored(folder, dtype=reference.dtype) as stored:
        return verify(stored, reference, undecided, execution=execution, progress=progress)


def assert_same_measurement(one: Measurement, other: Measurement) -> None:
    """To the last bit, but for the time that it took."""
    for field in fields(Measurement):
        if field.name not in ("tokens", "timings"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for field in fields(one.tokens):
        assert torch.equal(getattr(one.tokens, field.name), getattr(other.tokens, field.name)), field.name
