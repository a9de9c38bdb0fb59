"""Tokens for calibration or evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows of one length.

    Attributes:
        input_ids: int64 [samples, sequence_length].
        sha256: hex digest of the text that the tokens were made from.
        origin: the files' names or the dataset's id, without any path of this machine.
    """

    input_ids: torch.Tensor
    sha256: str
    origin: str
