"""A base model from a GGUF file: configuration, tokenizer and weights, as transformers would read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import gguf
import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.config_bounds import refuse_extreme
from qexport.artifact.digests import FileDigests
from qexport.errors import CompatibilityError, InputError
from qexport.formats.gguf.families import FAMILIES, GgufFamily, Places, places
from qexport.loading.model_weights import find_architecture, fit_to_model
from qexport.loading.packaged import PackageFile
from qexport.loading.small_files import read_sidecars
from qexport.progress import Progress, ProgressCallback
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.source import Origin, TensorSpec, Terms

_SUPPORTED: Final = ("llama", "qwen2")
_EXTRA_FIELDS: Final[Mapping[str, Mapping[str, str]]] = {"llama": {"rope.dimension_count": "head_dim"}}
"""Keys of the config by metadata key, beyond those that every family has."""

_REQUIRED: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL: Final = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_TOKENS: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def read_gguf(found: PackageFile, *, progress: ProgressCallback) -> Checkpoint:
    """The model in a GGUF file. Weights are dequantized to float32 as they are read.

    Raises:
        InputError: the file is malformed, or its tensors do not fit its metadata.
        CompatibilityError: its architecture, its rope scaling or a tensor's storage is not supported.
    """
    file = GgufFile(found.path)
    try:
        family = _family(file)
        config = _config(file, family)
        values = json.loads(config.to_json_string())
        architecture = find_architecture(values, tensors=len(file.tensors))
        source = GgufSource(file, places(family, config, architecture.skeleton.state_dict()))
        weights = fit_to_model(source, architecture)
        files = _files(found.path, config)
        digests = FileDigests(found.path.parent, (found.path.name,), {})
        origin = Origin("package", found.name, found.version, digests, _terms(file))
    except BaseException:
        file.close()
        raise
    progress(Progress("load", 1, 1, "file", detail=found.path.name))
    return Checkpoint(architecture, weights, files, origin)


def _terms(file: GgufFile) -> Terms:
    """The license in the metadata; a package's own license is not the model's."""
    found = file.metadata.get("general.license")
    return Terms(license=found if isinstance(found, str) and found.isprintable() and len(found) < 64 else None)


def _family(file: GgufFile) -> GgufFamily:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InputError("the file does not say its architecture", where=str(file.path), mend="fetch the file again")
    if name not in _SUPPORTED:
        raise CompatibilityError(
            f"GGUF files of architecture {name!r} are not supported",
            where=str(file.path),
            mend=f"supported: {', '.join(_SUPPORTED)}; or name the safetensors model that the file was made from",
        )
    experts = file.metadata.get(f"{name}.expert_count", 0)
    scaling = file.metadata.get(f"{name}.rope.scaling.type", "none")
    parts = file.metadata.get("split.count", 1)
    if experts or scaling != "none" or "rope_freqs.weight" in file.tensors or parts not in (0, 1):
        raise CompatibilityError(
            "mixtures of experts, scaled rotary embeddings and files in several parts are not supported in GGUF",
            where=str(file.path),
            mend="name the safetensors model that the file was made from",
        )
    return FAMILIES[name]


def _config(file: GgufFile, family: GgufFamily) -> PretrainedConfig:
    """The configuration that transformers reads from the same metadata, with the class that it loads."""
    prefix = str(file.metadata["general.architecture"])
    absent = [key for key in _REQUIRED if f"{prefix}.{key}" not in file.metadata]
    if absent:
        raise InputError(f"the metadata lack {', '.join(absent)}", where=str(file.path), mend="fetch the file again")
    fields = _REQUIRED | _OPTIONAL | dict(_EXTRA_FIELDS.get(prefix, {}))
    keys = {f"{prefix}.{key}": name for key, name in fields.items()}
    keys |= {f"tokenizer.ggml.{key}_token_id": name for key, name in _TOKENS.items()}
    values: dict[str, Any] = {name: file.metadata[key] for key, name in keys.items() if key in file.metadata}
    values.setdefault("vocab_size", file.array_lengths.get("tokenizer.ggml.tokens"))
    values |= {"tie_word_embeddings": "output.weight" not in file.tensors, "architectures": [family.causal_lm]}
    refuse_extreme(values, where=str(file.path))
    try:
        config = AutoConfig.for_model(prefix, **values)
    except Exception as error:  # the values are untrusted, and each family's checks raise errors of their own
        raise InputError(
            f"transformers cannot build a model from the metadata: {error}", where=str(file.path)
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _files(path: Path, config: PretrainedConfig) -> Mapping[str, bytes]:
    """Tokenizer, chat template and generation config as transformers would save them."""
    with TemporaryDirectory(prefix="qexport-gguf-") as folder:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the conversion raises many types of errors on malformed vocabularies
            raise InputError(f"transformers cannot convert the tokenizer: {error}", where=str(path)) from error
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        return read_sidecars(Path(folder))


_CHUNK_VALUES: Final = 1 << 20


class GgufSource:
    """A GGUF file as a `WeightSource`: every tensor is float32, however it is stored.

    Values and the order of rows are those that transformers loads with `GgufConfig(dequantize=True)`.

    Args:
        file: the open file.
        parameters: where the model's parameters are in it.

    Raises:
        CompatibilityError: a tensor is stored in a way that `gguf` cannot dequantize.
    """

    def __init__(self, file: GgufFile, parameters: Places) -> None:
        self._file, self._places = file, parameters
        renamed = {name: parameter for parameter, name in parameters.names.items() if name in file.tensors}
        # a tensor without a place in the model keeps the file's name, so that errors name it
        self._stored = {renamed.get(name, name): name for name in file.tensors}
        _refuse_unreadable(file)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape, float32, in the file's order."""
        return {
            name: TensorSpec(self._file.tensors[stored].shape, torch.float32) for name, stored in self._stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The dequantized tensor, float32. Its values are not checked.

        Raises:
            InputError: there is no tensor with this name, or the file has become shorter.
        """
        if name not in self._stored:
            raise InputError("there is no tensor with this name", where=f"{self._file.path}: {name}")
        return self._places.restored(name, self._dequantize(self._stored[name]))

    def place(self, name: str) -> str:
        """The file and the tensor's name in it, for an error's `where`."""
        return f"{self._file.path}: {self._stored[name]}"

    def _dequantize(self, stored: str) -> torch.Tensor:
        """Dequantizes some rows at a time, because `gguf.dequantize` holds its result twice."""
        tensor = self._file.tensors[stored]
        values = torch.empty(tensor.shape, dtype=torch.float32)
        rows, step = values.view(tensor.rows, tensor.shape[-1]), max(1, _CHUNK_VALUES // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            piece = gguf.dequantize(self._file.read_rows(stored, start, stop), tensor.kind)
            rows[start:stop] = torch.from_numpy(piece)
        return values


def _refuse_unreadable(file: GgufFile) -> None:
    first = {tensor.kind: name for name, tensor in file.tensors.items()}
    for kind, name in first.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise CompatibilityError(
                f"the gguf package cannot dequantize {kind.name}", where=f"{file.path}: {name}"
            ) from error
