"""Oracles for CUDA, which want a GPU: `make test-gpu`. Without one only the column kernel's own tests run, by the name
of their file, in Triton's interpreter.

QEXPORT_CUDA_STANDS_IN=1 runs the oracles on the device of tests/cuda_stand_in.py instead, for whoever works on them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cuda_stand_in import cuda_stands_in

STANDS_IN = bool(os.environ.get("QEXPORT_CUDA_STANDS_IN"))
HERE = torch.cuda.is_available()

if not HERE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before anything is imported that is missing without a GPU."""
    if not HERE and not STANDS_IN and any("test_column_kernel.py" not in each for each in session.config.args):
        pytest.exit("tests/gpu: torch sees no GPU of CUDA here (torch.cuda.is_available() is False)", returncode=1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device."""
    if not STANDS_IN:
        yield torch.device("cuda")
        return
    with cuda_stands_in(monkeypatch) as device:
        yield device
