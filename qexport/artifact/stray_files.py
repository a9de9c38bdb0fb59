"""Files beside an artifact's weights that some loader would read or run as well, so that users get another model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from qexport.errors import InputError, listed

_WEIGHTS: Final = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|npz)(\.index(\..+)?\.json)?", re.IGNORECASE
)
"""Weights, and the indexes of their shards, by the names that transformers, TGI, vLLM, llama.cpp and ONNX Runtime know.
"""

_OF_TRAINING: Final = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
"""What a training run leaves behind; no loader opens it."""

_NAMED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "adapter_config.json": "transformers and TGI apply the adapter that it names to the model",
        "hf_quant_config.json": "vLLM, SGLang and TensorRT-LLM take the quantization from it",
        "custom_generate/generate.py": "transformers runs it in place of its own generate, with trust_remote_code",
    }
)
"""Files that change a model without being weights, from transformers 5.23 (`integrations/peft.py`,
`generation/utils.py`) and vLLM 0.32 (`vllm/config/model.py`)."""


def stray_files(names: Iterable[str], weights: Collection[str]) -> dict[str, str]:
    """The files of a folder that a loader would read or run beside the artifact, with what it does with each.

    Text, images and files in other folders are no business of a loader, and neither is what training left behind.

    Args:
        names: the files, by their paths inside the folder.
        weights: the files that hold the artifact's weights, and their index.
    """
    found: dict[str, str] = {}
    for name in sorted(set(names) - set(weights)):
        if reason := _NAMED.get(name):
            found[name] = reason
        elif "/" not in name and _WEIGHTS.fullmatch(name) and not _OF_TRAINING.fullmatch(name):
            found[name] = "weights that are not the artifact's, which a loader may take in their place or add to them"
    return found


def refuse_stray_files(folder: Path, weights: Collection[str]) -> None:
    """Refuses a folder with such files: which model users get would depend on how they load it.

    Args:
        folder: the artifact, or a folder that another tool made.
        weights: the files that hold the artifact's weights, and their index.

    Raises:
        InputError: there are some; the error names all of them.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*") if path.is_file()]
    names += [name for name in _NAMED if "/" in name and (folder / name).is_file()]
    if found := stray_files(names, weights):
        raise InputError(
            "the folder holds files that a loader would read beside the artifact",
            where=f"{folder}: {listed([f'{name} ({reason})' for name, reason in found.items()])}",
            mend="remove them, or fetch the artifact again",
        )
