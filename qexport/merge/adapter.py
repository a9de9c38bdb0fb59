"""A PEFT adapter in its folder: its tensors, and the fields of adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from qexport.errors import CompatibilityError, InputError
from qexport.merge.stored import trained_targets, without_names
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.source import WeightSource
from qexport.tensors.strict_files import CONFIG_BYTES, read_json_object

_PROVENANCE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


class AdapterOptions(BaseModel):
    """The options that decide which modules an adapter changes. Subclasses add those of single types."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields of this type that affect the training only, and not a merge."""

    peft_type: str
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """The options of an adapter_config.json.

        An unknown field that is switched off (null, false, zero, empty) is ignored, since a newer PEFT may have added
        it; any other could change the arithmetic.

        Raises:
            InputError: fields have wrong types or invalid values; all of them are named.
            CompatibilityError: a field is set that this version does not know.
        """
        try:
            options = cls.model_validate(dict(config))
        except ValidationError as error:
            problems = "; ".join(f"{_path(item['loc'])}: {item['msg']}" for item in error.errors())
            raise InputError(f"invalid values: {problems}", where="adapter_config.json") from error
        unknown = sorted(
            name
            for name, value in (options.model_extra or {}).items()
            if value and name not in _PROVENANCE and name not in cls.without_effect
        )
        if unknown:
            raise CompatibilityError(
                f"this version of qexport does not know these options of {options.peft_type}: {', '.join(unknown)}",
                where="adapter_config.json",
                mend=MERGE_WITH_PEFT,
            )
        return options


MERGE_WITH_PEFT = (
    "merge with PEFT (merge_and_unload, then save_pretrained of the model and its tokenizer) and give that folder "
    "as load.base, without an adapter"
)
"""What to do with an adapter that PEFT can merge and qexport cannot."""


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter whose configuration and header have been read.

    Attributes:
        folder: where it is.
        config: the content of adapter_config.json; its target_modules only names what was trained.
        peft_type: its type, for example `LORA`.
        file: its tensors, named as PEFT names them.
        untrained: the other names in its target_modules.
    """

    folder: Path
    config: Mapping[str, Any]
    peft_type: str
    file: WeightSource
    untrained: tuple[str, ...] = ()

    def read(self, key: str) -> torch.Tensor:
        """One tensor as float32, or as it is if it holds whole numbers; the caller owns it."""
        tensor = self.file.read(key)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def read_adapter(folder: Path) -> Adapter:
    """Reads configuration and header; no tensor yet.

    Raises:
        InputError: a file is missing or malformed.
    """
    config = read_json_object(folder / CONFIG_FILE, limit=CONFIG_BYTES)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise InputError("the adapter has no peft_type", where=CONFIG_FILE, mend="save it with PEFT again")
    tensors = without_names(SafetensorsFile(folder / WEIGHTS_FILE))
    trained, untrained = trained_targets(config, tensors.specs()) or (config.get("target_modules"), [])
    changed = {**config, "target_modules": trained} if untrained else config
    return Adapter(folder, changed, peft_type, tensors, tuple(untrained))
