"""Where a checkpoint or an adapter came from; and token windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint or an adapter came from, without any path of this machine.

    Attributes:
        kind: a local folder, a model hub, or a file inside an installed package.
        name: the folder's last component, the hub id, or `package/file`.
        revision: the commit that a hub id resolved to, or the package's version.
        sha256: hex digest of each file read, by its name inside the folder.
    """

    kind: Literal["folder", "hub", "package"]
    name: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


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
