"""A PEFT adapter as it lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from qexport.errors import InputError
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.strict_json import read_json_object

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT writes before every module path."""

_CONFIG_LIMIT: Final = 1 << 24


@dataclass(frozen=True)
class Adapter:
    """An adapter whose configuration and header have been read.

    Attributes:
        folder: where it lies.
        config: the content of adapter_config.json.
        peft_type: its type, for example `LORA`.
        file: its tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    peft_type: str
    file: SafetensorsFile

    def read(self, key: str) -> torch.Tensor:
        """One tensor as float32, which the caller owns.

        Raises:
            InputError: the file was cut short.
        """
        return self.file.read(key).to(torch.float32)


def read_adapter(folder: Path) -> Adapter:
    """Reads configuration and header; no tensor yet.

    Raises:
        InputError: a file is missing or malformed.
    """
    config = read_json_object(folder / CONFIG_FILE, limit=_CONFIG_LIMIT)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise InputError("the adapter does not say its peft_type", where=CONFIG_FILE, mend="save it with PEFT anew")
    return Adapter(folder, config, peft_type, SafetensorsFile(folder / WEIGHTS_FILE))
