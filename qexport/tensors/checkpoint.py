"""A model as it was found: configuration, weights, and the files that travel with it; and token windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from qexport.tensors.source import WeightSource


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
class Checkpoint:
    """A base model, or a base model with its adapter merged.

    Attributes:
        config: the content of config.json, without the keys that would load code.
        weights: the tensors, named as in the checkpoint's files.
        files: tokenizer, chat template and generation config by file name, byte for byte.
        origin: where it came from.
    """

    config: Mapping[str, Any]
    weights: WeightSource
    files: Mapping[str, bytes]
    origin: Origin


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
