"""A base model from a GGUF file: configuration, tokenizer and weights, as transformers would read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from qexport.architectures.architecture import Checkpoint
from qexport.artifact.digests import FileDigests
from qexport.errors import CompatibilityError, InputError
from qexport.formats.gguf.dequantizing import dequantized, refuse_unreadable
from qexport.formats.gguf.families import Places, places
from qexport.formats.gguf.pre_tokenizers import named, structure_of
from qexport.loading.gguf_config import FREQUENCIES, read_config
from qexport.loading.model_weights import find_architecture, fit_to_model
from qexport.loading.small_files import read_sidecars
from qexport.progress import Progress, ProgressCallback
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.gguf_parts import open_gguf
from qexport.tensors.source import Origin, TensorSpec, Terms


def read_gguf(
    path: Path,
    *,
    kind: Literal["file", "package"],
    name: str,
    revision: str | None = None,
    progress: ProgressCallback,
) -> Checkpoint:
    """The model in a GGUF file. Weights are dequantized to float32 as they are read.

    Args:
        path: the file, of several the first.
        kind: where it came from.
        name: the origin's name.
        revision: the version of its package.
        progress: is called when the header has been read.

    Raises:
        InputError: the file is malformed, or its tensors do not fit its metadata.
        CompatibilityError: its architecture, its tokenizer or a tensor's storage is not supported.
    """
    file = open_gguf(path)
    try:
        family, config = read_config(file)
        values = json.loads(config.to_json_string())
        architecture = find_architecture(values, tensors=len(file.tensors))
        parameters = places(family, config, architecture.skeleton.state_dict())
        source = GgufSource(file, parameters)
        weights = fit_to_model(source, architecture)
        files = _files(file, config)
        digests = FileDigests(path.parent, tuple(each.name for each in file.paths), {})
        origin = Origin(kind, name, revision, digests, _terms(file))
    except BaseException:
        file.close()
        raise
    progress(Progress("load", len(file.paths), len(file.paths), "file", detail=path.name))
    return Checkpoint(architecture, weights, files, origin)


def files_in_header(file: GgufFile) -> dict[str, bytes]:
    """config.json, and the files of the tokenizer and of generation as transformers would save them, by name.

    Raises:
        InputError: the header is malformed.
        CompatibilityError: the architecture or the tokenizer is not supported.
    """
    _, config = read_config(file)
    values = _as_float32(json.loads(config.to_json_string()))
    return {"config.json": json.dumps(values, indent=2).encode("utf-8"), **_files(file, config)}


def _as_float32(value: Any) -> Any:
    """The same with the shortest numbers that are equal in float32, which the header has: 1e-06, not 9.99999997e-07."""
    if isinstance(value, float):
        return float(np.format_float_scientific(np.float32(value)))
    if isinstance(value, list):
        return [_as_float32(each) for each in value]
    return {key: _as_float32(each) for key, each in value.items()} if isinstance(value, dict) else value


def _terms(file: GgufFile) -> Terms:
    """The license in the metadata; a package's own license is not the model's."""
    found = file.metadata.get("general.license")
    return Terms(license=found if isinstance(found, str) and found.isprintable() and len(found) < 64 else None)


def _files(file: GgufFile, config: PretrainedConfig) -> Mapping[str, bytes]:
    """Tokenizer, chat template and generation config as transformers would save them."""
    path = file.path
    with TemporaryDirectory(prefix="qexport-gguf-") as folder:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the conversion raises many types of errors on malformed vocabularies
            raise InputError(f"transformers cannot convert the tokenizer: {error}", where=str(path)) from error
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        saved = Path(folder) / "tokenizer.json"
        saved.write_text(_split_as_named(saved.read_text("utf-8"), file), "utf-8")
        return read_sidecars(Path(folder))


def _split_as_named(tokenizer: str, file: GgufFile) -> str:
    """tokenizer.json with the pre-tokenizer that the file names, and whether merges count for what is a token already.

    transformers takes GPT-2's for every name that it does not know, and never ignores merges, which gives other tokens
    and no warning: Falcon's and SmolLM's split numbers in another way, Llama 3's takes tokens that no merges lead to.
    """
    name = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    known = named(name) if isinstance(name, str) else None
    if known is None:
        raise CompatibilityError(
            "the file does not say how its tokenizer splits a text"
            if name is None
            else f"the tokenizer splits a text as {name!r} does, which is not known here",
            where=f"{file.path}: tokenizer.ggml.pre",
            mend="name the safetensors model that the file was made from",
        )
    content = json.loads(tokenizer)
    content["pre_tokenizer"] = structure_of(known)
    content["model"]["ignore_merges"] = known.ignores_merges
    return json.dumps(content, indent=2, ensure_ascii=False)


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
        self._stored = {renamed.get(name, name): name for name in file.tensors if name != FREQUENCIES}
        refuse_unreadable(file)

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
        return self.read_rounded(name, torch.float32)

    def read_rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See `RoundingSource.read_rounded`."""
        if name not in self._stored:
            raise InputError("there is no tensor with this name", where=f"{self._file.path}: {name}")
        return self._places.restored(name, self._dequantize(self._stored[name], dtype))

    def place(self, name: str) -> str:
        """The file and the tensor's name in it, for an error's `where`."""
        return f"{self._file.path}: {self._stored[name]}"

    def _dequantize(self, stored: str, dtype: torch.dtype) -> torch.Tensor:
        """Reads some rows at a time."""
        tensor = self._file.tensors[stored]
        values = torch.empty(tensor.shape, dtype=dtype)
        rows, step = values.view(tensor.rows, tensor.shape[-1]), max(1, _CHUNK_VALUES // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            rows[start:stop] = dequantized(self._file.read_rows(stored, start, stop), tensor.kind, dtype)
        return values
