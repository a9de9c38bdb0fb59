"""A base model from a GGUF file: configuration, tokenizer and weights, as transformers would convert them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import gguf
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from qexport.artifact.digest import sha256_file
from qexport.errors import CompatibilityError, InputError
from qexport.loading.gguf_file import GgufFile
from qexport.loading.gguf_weights import GgufWeights
from qexport.loading.model_weights import build_model, fit_to_model
from qexport.loading.package import PackageFile
from qexport.loading.sidecars import read_sidecars
from qexport.progress import Progress, Reporter
from qexport.tensors.checkpoint import Checkpoint, Origin


@dataclass(frozen=True)
class _Family:
    """How llama.cpp writes an architecture.

    Attributes:
        arch: the gguf package's name for it.
        causal_lm: the class of transformers.
        permuted: the rows of queries and keys are reordered for ggml's rotary embedding.
        extra_fields: config keys by metadata key, beyond those that every family has.
    """

    arch: gguf.MODEL_ARCH
    causal_lm: str
    permuted: bool
    extra_fields: Mapping[str, str] = field(default_factory=dict)


_FAMILIES: Final = {
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, "LlamaForCausalLM", True, {"rope.dimension_count": "head_dim"}),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2, "Qwen2ForCausalLM", False),
}

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


def read_gguf(found: PackageFile, *, report: Reporter) -> Checkpoint:
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
        model = build_model(values, tensors=len(file.tensors))
        source = GgufWeights(
            file, arch=family.arch, config=config, parameters=model.state_dict(), permuted=family.permuted
        )
        weights = fit_to_model(source, model)
        files = _files(found.path, config)
        origin = Origin("package", found.name, found.version, {found.path.name: sha256_file(found.path)})
    except BaseException:
        file.close()
        raise
    report(Progress("load", 1, 1, "file", detail=found.path.name))
    return Checkpoint(values, weights, files, origin)


def _family(file: GgufFile) -> _Family:
    name = file.metadata.get("general.architecture")
    family = _FAMILIES.get(str(name))
    if family is None:
        raise CompatibilityError(
            f"GGUF files of architecture {name!r} are not read",
            where=str(file.path),
            mend=f"supported: {', '.join(_FAMILIES)}; or name the safetensors model that the file was made from",
        )
    experts = file.metadata.get(f"{name}.expert_count", 0)
    scaling = file.metadata.get(f"{name}.rope.scaling.type", "none")
    parts = file.metadata.get("split.count", 1)
    if experts or scaling != "none" or "rope_freqs.weight" in file.tensors or parts not in (0, 1):
        raise CompatibilityError(
            "mixtures of experts, scaled rotary embeddings and files in several parts are not read from GGUF",
            where=str(file.path),
            mend="name the safetensors model that the file was made from",
        )
    return family


def _config(file: GgufFile, family: _Family) -> PretrainedConfig:
    """The configuration that transformers reads from the same metadata, with the class that it loads."""
    prefix = str(file.metadata["general.architecture"])
    absent = [key for key in _REQUIRED if f"{prefix}.{key}" not in file.metadata]
    if absent:
        raise InputError(f"the metadata lack {', '.join(absent)}", where=str(file.path), mend="fetch the file anew")
    fields = _REQUIRED | _OPTIONAL | dict(family.extra_fields)
    keys = {f"{prefix}.{key}": name for key, name in fields.items()}
    keys |= {f"tokenizer.ggml.{key}_token_id": name for key, name in _TOKENS.items()}
    values: dict[str, Any] = {name: file.metadata[key] for key, name in keys.items() if key in file.metadata}
    values.setdefault("vocab_size", file.array_lengths.get("tokenizer.ggml.tokens"))
    values |= {"tie_word_embeddings": "output.weight" not in file.tensors, "architectures": [family.causal_lm]}
    try:
        config = AutoConfig.for_model(prefix, **values)
    except Exception as error:  # the values are somebody else's, and the family's checks raise what they please
        raise InputError(f"the metadata describe no model: {error}", where=str(file.path)) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _files(path: Path, config: PretrainedConfig) -> Mapping[str, bytes]:
    """Tokenizer, chat template and generation config as transformers would save them."""
    with TemporaryDirectory(prefix="qexport-gguf-") as folder:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the conversion raises what it pleases on malformed vocabularies
            raise InputError(f"transformers cannot convert the tokenizer: {error}", where=str(path)) from error
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        return read_sidecars(Path(folder))
