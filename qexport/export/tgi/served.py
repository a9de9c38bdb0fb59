"""An artifact as TGI finds it: the tensors that it loads, and what it derives from them and the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from qexport.artifact.disk import disk_failure
from qexport.errors import InputError
from qexport.export.launch import FOLDER
from qexport.export.served import ServedModel, ServedWeights
from qexport.export.tgi.families import OWN_MODELS, OwnModel, ServedLinear, Shape, served_linears
from qexport.export.tgi.kernels import Codes
from qexport.export.tgi.launch import ENVIRONMENT
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.text.file_names import TOKENIZER_CONFIG

RESERVED_WORDS: Final = ("arguments", "args", "adapter", "training")
"""Words that make TGI skip a file of weights (`utils/hub.py`)."""

_IN_BLOCK: Final = re.compile(r".+\.(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<module>.+)")
_CODE_KEYS: Final = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}


class ServedByTgi(ServedModel):
    """An artifact as TGI finds it; see `ServedModel`."""

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors of every `*.safetensors` in the folder itself; the index is ignored (`utils/hub.py`)."""
        specs: dict[str, TensorSpec] = {}
        files: dict[str, str] = {}
        duplicates, unreadable = list[str](), dict[str, str]()
        for path in sorted(folder.glob("*.safetensors")):
            if any(word in path.name for word in RESERVED_WORDS):
                continue
            try:
                with SafetensorsFile(path) as opened:
                    found = opened.specs()
            except InputError as error:
                if disk_failure(error, where=None):
                    raise
                unreadable[path.name] = error.what
                continue
            duplicates += [name for name in found if name in specs]
            specs = {**found, **specs}
            files = {**dict.fromkeys(found, path.name), **files}
        return ServedWeights(specs, files, tuple(duplicates), unreadable)

    @property
    def family(self) -> OwnModel | None:
        """TGI's own model for the family; None if it has none."""
        return OWN_MODELS.get(str(self.config.get("model_type")))

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """The content of tokenizer_config.json; empty if it cannot be read."""
        return self.json(TOKENIZER_CONFIG)

    @cached_property
    def codes(self) -> Codes | None:
        """The GPTQ codes as config.json describes them; None if there are none or a value is missing."""
        if self.method != "gptq":
            return None
        values = {key: self.quantization.get(key) for key in _CODE_KEYS}
        if any(type(values[key]) is not kind for key, kind in _CODE_KEYS.items()) or values["bits"] not in range(1, 33):
            return None
        return Codes(**values)  # type: ignore[arg-type]

    @cached_property
    def quantized(self) -> dict[str, Shape]:
        """Outputs and inputs of the modules that have a `qweight`, by path."""
        bits = self.codes.bits if self.codes else 4
        return {
            name.removesuffix(".qweight"): (spec.shape[1], spec.shape[0] * 32 // bits)
            for name, spec in self.tensors.items()
            if name.endswith(".qweight") and len(spec.shape) == 2
        }

    @cached_property
    def unquantized(self) -> dict[str, Shape]:
        """Outputs and inputs of the blocks' matrices that are stored as `weight`, even int8 codes, by module path."""
        return {
            name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
            for name, spec in self.tensors.items()
            if name.endswith(".weight") and _IN_BLOCK.fullmatch(name) and len(spec.shape) == 2
        }

    @cached_property
    def layers(self) -> dict[int, set[str]]:
        """The modules with tensors in each decoder layer, by the layer's number."""
        layers: dict[int, set[str]] = {}
        for name in self.tensors:
            if found := _IN_BLOCK.fullmatch(name):
                layers.setdefault(int(found["layer"]), set()).add(found["module"].rpartition(".")[0])
        return layers

    @cached_property
    def linears(self) -> list[ServedLinear]:
        """The linears of the blocks as TGI joins them."""
        return served_linears({**self.quantized, **self.unquantized}, self.family or OwnModel())

    @property
    def environment(self) -> dict[str, str] | None:
        """The settings in the launch files; None if there are no launch files."""
        name = f"{FOLDER}/{ENVIRONMENT}"
        if name not in self.files:
            return None
        lines = self.files[name].decode("utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor of a folder on disk."""
        assert self.folder is not None
        with SafetensorsFile(self.folder / self.weights.files[name]) as file:
            return file.read(name)
