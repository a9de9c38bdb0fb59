"""An artifact as TGI finds it: the tensors that it loads, and what it derives from them and the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from qexport.artifact.disk import disk_failure
from qexport.errors import InputError
from qexport.export.model_files import FOLDER, render_launch_files
from qexport.export.served import ServedModel, ServedWeights
from qexport.export.tgi.families import OWN_MODELS, OwnModel, ServedLinear, Shape, num_kv_heads, served_linears
from qexport.export.tgi.kernels import Codes
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.text.file_names import TOKENIZER_CONFIG

IMAGE: Final = "ghcr.io/huggingface/text-generation-inference:3.3.5"
ENVIRONMENT: Final = "tgi.env"

_MODEL: Final = "/model"
_KV_BYTES: Final = 2
_RESERVE: Final = 2 * 2**30
_GPU_BYTES: Final = 80 * 10**9
_LONGEST: Final = 8192
_UNKNOWN_CONTEXT: Final = 2048
_ANSWER: Final = 1024
_FILES: Final = ("README.md", ENVIRONMENT, "docker-run.sh", "compose.yaml", "kubernetes.yaml")


@dataclass(frozen=True)
class TgiLaunch:
    """The values in the launch files.

    Attributes:
        config: the result of `tgi_config`.
        weight_bytes: size of the weights in the server's memory, over all shards.
        degrees: tensor-parallel degrees that work.
        quantize: the value of `--quantize`; None to omit it.
        dtype: the value of `--dtype`; None if the method decides it.
        image: the server's container image.
        model: the folder in the container.
        environment_file: the name of the file with the settings.
    """

    config: Mapping[str, Any]
    weight_bytes: int
    degrees: list[int]
    quantize: str | None
    dtype: str | None
    image: str = IMAGE
    model: str = _MODEL
    environment_file: str = ENVIRONMENT

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that the model was made for."""
        return self._count("max_position_embeddings", "n_positions", "max_seq_len") or _UNKNOWN_CONTEXT

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer that the server allows."""
        return min(self.context, _LONGEST)

    @property
    def input_tokens(self) -> int:
        """Tokens of the prompt that the server allows."""
        return self.total_tokens - max(1, min(_ANSWER, self.total_tokens // 4))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values for one token, in 16 bits."""
        layers = self._count("num_hidden_layers", "n_layer", "n_layers")
        heads = self._count("num_attention_heads", "n_head", "n_heads")
        head_dim = self._count("head_dim") or self._count("hidden_size", "n_embd", "d_model") // max(1, heads)
        return 2 * layers * num_kv_heads(self.config) * head_dim * _KV_BYTES

    def gpu_bytes(self, degree: int) -> int:
        """Bytes that each of `degree` GPUs needs: its weights, one request of full length, and a reserve."""
        return (self.weight_bytes + self.kv_bytes * self.total_tokens) // degree + _RESERVE

    @property
    def num_shard(self) -> int:
        """The smallest degree that fits GPUs of 80 GB, or the largest degree if none does."""
        return next((degree for degree in self.degrees if self.gpu_bytes(degree) <= _GPU_BYTES), self.degrees[-1])

    @property
    def environment(self) -> dict[str, str]:
        """The server's settings: each flag of the launcher is an environment variable."""
        values = {
            "MODEL_ID": self.model,
            "QUANTIZE": self.quantize,
            "DTYPE": self.dtype,
            "NUM_SHARD": str(self.num_shard),
            "MAX_INPUT_TOKENS": str(self.input_tokens),
            "MAX_TOTAL_TOKENS": str(self.total_tokens),
            "MAX_BATCH_PREFILL_TOKENS": str(self.input_tokens),
        }
        return {key: value for key, value in values.items() if value is not None}

    def _count(self, *keys: str) -> int:
        return next((int(self.config[key]) for key in keys if self.config.get(key)), 0)


def launch_files(figures: TgiLaunch) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact."""
    return render_launch_files("qexport.export.tgi", {name: f"{name}.jinja" for name in _FILES}, figures)


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
