"""A folder as TGI finds it on the disk. Nothing here knows how it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from qexport.errors import InputError
from qexport.export.launch import FOLDER
from qexport.export.tgi.families import OWN_MODELS, OwnModel
from qexport.export.tgi.kernels import Codes
from qexport.export.tgi.launch import ENVIRONMENT
from qexport.export.tgi.linears import ServedLinear, Shape, served_linears
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.strict_files import read_json_object

RESERVED_WORDS: Final = ("arguments", "args", "adapter", "training")
"""Words that make TGI skip a file of weights (`utils/hub.py`)."""

_LIMIT: Final = 1 << 26
_IN_BLOCK: Final = re.compile(r".+\.(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<module>.+)")


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it."""

    file: str
    spec: TensorSpec


@dataclass(frozen=True)
class ServedFolder:
    """What lies in a folder.

    Attributes:
        path: the folder.
        config: config.json; empty where it cannot be read.
        tokenizer_config: tokenizer_config.json; empty where it cannot be read.
        quantize_config: quantize_config.json; None where there is none.
        tensors: every tensor of the files that TGI loads, by name; of one that is there twice, the first.
        twice: names that are in more than one file.
        unreadable: what cannot be read, by file, with the reason.
    """

    path: Path
    config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    quantize_config: Mapping[str, Any] | None
    tensors: Mapping[str, Stored]
    twice: tuple[str, ...]
    unreadable: Mapping[str, str]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json; empty where there is none."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def method(self) -> str | None:
        """The method that TGI picks from config.json."""
        method = self.quantization.get("quant_method")
        return method if isinstance(method, str) else None

    @cached_property
    def codes(self) -> Codes | None:
        """What config.json says of GPTQ codes; None where it does not say it, or there are none."""
        if self.method != "gptq":
            return None
        values = {key: self.quantization.get(key) for key in ("bits", "group_size", "sym", "desc_act")}
        kinds = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}
        if any(type(values[key]) is not kind for key, kind in kinds.items()) or values["bits"] not in range(1, 33):
            return None
        return Codes(**values)  # type: ignore[arg-type]

    @cached_property
    def quantized(self) -> dict[str, Shape]:
        """Outputs and inputs of the modules that have a `qweight`, by path."""
        bits = self.codes.bits if self.codes else 4
        return {
            name.removesuffix(".qweight"): (stored.spec.shape[1], stored.spec.shape[0] * 32 // bits)
            for name, stored in self.tensors.items()
            if name.endswith(".qweight") and len(stored.spec.shape) == 2
        }

    @cached_property
    def dense(self) -> dict[str, Shape]:
        """Outputs and inputs of the matrices in the blocks that are stored as `weight`, by module path."""
        return {
            name.removesuffix(".weight"): (stored.spec.shape[0], stored.spec.shape[1])
            for name, stored in self.tensors.items()
            if name.endswith(".weight") and _IN_BLOCK.fullmatch(name) and len(stored.spec.shape) == 2
        }

    @cached_property
    def layers(self) -> dict[int, set[str]]:
        """The modules of each decoder layer that have tensors, by the layer's number."""
        layers: dict[int, set[str]] = {}
        for name in self.tensors:
            if found := _IN_BLOCK.fullmatch(name):
                layers.setdefault(int(found["layer"]), set()).add(found["module"].rpartition(".")[0])
        return layers

    @cached_property
    def linears(self) -> list[ServedLinear]:
        """The linears of the blocks as TGI joins them."""
        model = OWN_MODELS.get(str(self.config.get("model_type")), OwnModel())
        return served_linears({**self.quantized, **self.dense}, model)

    @cached_property
    def environment(self) -> dict[str, str] | None:
        """The launch files' settings; None where there are none."""
        path = self.path / FOLDER / ENVIRONMENT
        if not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        with SafetensorsFile(self.path / self.tensors[name].file) as file:
            return file.read(name)


def read_folder(path: Path) -> ServedFolder:
    """Reads configs and headers. Files that cannot be read are noted, not raised."""
    unreadable: dict[str, str] = {}

    def read_json(name: str) -> Mapping[str, Any] | None:
        try:
            return read_json_object(path / name, limit=_LIMIT)
        except InputError as error:
            unreadable[name] = error.what
            return None

    tensors, twice = _read_headers(path, unreadable)
    quantize_config = read_json("quantize_config.json") if (path / "quantize_config.json").exists() else None
    return ServedFolder(
        path,
        read_json("config.json") or {},
        read_json("tokenizer_config.json") or {},
        quantize_config,
        tensors,
        twice,
        unreadable,
    )


def _read_headers(path: Path, unreadable: dict[str, str]) -> tuple[dict[str, Stored], tuple[str, ...]]:
    tensors: dict[str, Stored] = {}
    twice: list[str] = []
    for file in sorted(path.glob("*.safetensors")):
        if any(word in file.name for word in RESERVED_WORDS):
            continue
        try:
            with SafetensorsFile(file) as opened:
                specs = opened.specs()
        except InputError as error:
            unreadable[file.name] = error.what
            continue
        twice += [name for name in specs if name in tensors]
        tensors = {name: Stored(file.name, spec) for name, spec in specs.items()} | tensors
    return tensors, tuple(twice)
