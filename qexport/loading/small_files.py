"""The small files of a model: config.json, the tokenizer's files, chat template and generation config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.families import without_code_keys
from qexport.errors import InputError
from qexport.progress import Notice, ProgressCallback
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, parse_json, read_bounded, read_json_object
from qexport.text.file_names import CHAT_TEMPLATE, GENERATION_CONFIG, OLD_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

CONFIG_NAME: Final = "config.json"


def read_config(folder: Path, *, trusted_root: Path | None, progress: ProgressCallback) -> dict[str, Any]:
    """The content of the folder's config.json without the keys that would load code.

    Args:
        folder: the model's folder.
        trusted_root: where symbolic links may lead; the folder itself if None.
        progress: is called with the keys that were dropped.

    Raises:
        InputError: the file is missing, not a JSON object, or has a key twice or no model_type.
    """
    path = contained_path(folder, CONFIG_NAME, root=trusted_root)
    if not path.is_file():
        raise _no_config(folder)
    raw = read_json_object(path, limit=CONFIG_BYTES)
    config, dropped = without_code_keys(_with_marked_floats(raw))
    if dropped:
        progress(Notice(f"config.json: dropped {', '.join(dropped)}; nothing from a model folder is executed"))
    if not isinstance(config.get("model_type"), str):
        raise InputError("model_type must name the model's family", where=str(path), mend="fetch the model again")
    return config


def _with_marked_floats(value: Any) -> Any:
    """Infinities as transformers 5 writes them: the literals that older versions wrote are not JSON."""
    if isinstance(value, list):
        return [_with_marked_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_marked_floats(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _no_config(folder: Path) -> InputError:
    if (folder / "adapter_config.json").is_file():
        mend = "this folder holds an adapter: name it as load.adapter, and its base model as load.base"
    elif any(folder.glob("*.gguf")):
        mend = "GGUF files are read from installed packages only: pkg:package/file.gguf"
    else:
        mend = "name the folder that a transformers model was saved to"
    return InputError(f"the folder holds no {CONFIG_NAME}", where=str(folder), mend=mend)


SIDECAR_NAMES: Final = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    CHAT_TEMPLATE,
    OLD_TEMPLATE,
    GENERATION_CONFIG,
)

SIDECAR_PATTERNS: Final = (*SIDECAR_NAMES, f"{TEMPLATES_FOLDER}/*.jinja")
"""The same and all chat templates, as a hub finds them."""


def read_sidecars(folder: Path, *, trusted_root: Path | None = None) -> Mapping[str, bytes]:
    """The content of each file of `SIDECAR_NAMES` and each chat template in the folder, by its name inside it.

    Raises:
        InputError: a file cannot be read or is too large, or a symbolic link leads out of `trusted_root` (the folder if
            None).
    """
    templates = contained_path(folder, TEMPLATES_FOLDER, root=trusted_root)
    extra = sorted(f"{TEMPLATES_FOLDER}/{path.name}" for path in templates.glob("*.jinja"))
    files: dict[str, bytes] = {}
    for name in (*SIDECAR_NAMES, *extra):
        path = contained_path(folder, name, root=trusted_root)
        if path.is_file():
            try:
                files[name] = read_bounded(path, _SIDECAR_BYTES)
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return files


_SIDECAR_BYTES: Final = 1 << 27
"""The largest tokenizers have some 40 MB."""

_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def open_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer as transformers reads it, with its chat template. Executes no code of the model.

    Raises:
        InputError: the checkpoint has no tokenizer, or transformers cannot read it.
    """
    return tokenizer_from_files(checkpoint.files, checkpoint.config, name=checkpoint.origin.name)


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether a vocabulary is among a model's files."""
    return any(name in files for name in _VOCABULARIES)


def tokenizer_from_files(
    files: Mapping[str, bytes], config: Mapping[str, Any], *, name: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder's files, also a finished artifact's. Executes no code in them.

    Args:
        files: by name inside the folder, as `read_sidecars` gives them.
        config: the content of config.json.
        name: the model's, for errors.

    Raises:
        InputError: there is no tokenizer, or transformers cannot read it.
    """
    if not has_tokenizer(files):
        raise InputError(
            "the model has no tokenizer",
            where=name,
            mend="save the tokenizer into the model's folder: tokenizer.save_pretrained(FOLDER)",
        )
    with TemporaryDirectory(prefix="qexport-tokenizer-") as folder:
        _write_files(files, config, Path(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # tokenizers and transformers raise many types of errors on malformed files
            raise InputError(
                f"transformers cannot read the tokenizer: {error}",
                where=name,
                mend="fetch the model's tokenizer files again",
            ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.name_or_path = name
    return tokenizer


def _write_files(files: Mapping[str, bytes], config: Mapping[str, Any], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if name != TOKENIZER_CONFIG else _without_code_keys(content))
    (folder / CONFIG_NAME).write_text(json.dumps(without_code_keys(config)[0]), encoding="utf-8")


def _without_code_keys(tokenizer_config: bytes) -> bytes:
    """The file without the keys that would load code; a family that transformers knows needs none of them."""
    content = parse_json(tokenizer_config, where=TOKENIZER_CONFIG)
    if not isinstance(content, dict):
        raise InputError("must hold a JSON object", where=TOKENIZER_CONFIG)
    return json.dumps(without_code_keys(content)[0]).encode()
