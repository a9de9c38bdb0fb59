"""The tokenizer that travels with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qexport.architectures.code_keys import without_code_keys
from qexport.errors import InputError
from qexport.loading.config_file import CONFIG_NAME
from qexport.tensors.checkpoint import Checkpoint
from qexport.tensors.strict_json import parse_json
from qexport.text.tokenizer_files import TOKENIZER_CONFIG

_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def open_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer as transformers reads it, with its chat template. Executes nothing of the model's.

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
    """The tokenizer in a folder's files, also a finished artifact's. Executes nothing of them.

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
        except Exception as error:  # tokenizers and transformers raise what they please on malformed files
            raise InputError(
                f"transformers cannot read the tokenizer: {error}",
                where=name,
                mend="fetch the model's tokenizer files anew",
            ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.name_or_path = name
    return tokenizer


def _write_files(files: Mapping[str, bytes], config: Mapping[str, Any], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if name != TOKENIZER_CONFIG else _harmless(content))
    (folder / CONFIG_NAME).write_text(json.dumps(without_code_keys(config)[0]), encoding="utf-8")


def _harmless(tokenizer_config: bytes) -> bytes:
    """The file without the keys that would load code; a family that transformers knows needs none of them."""
    content = parse_json(tokenizer_config, where=TOKENIZER_CONFIG)
    if not isinstance(content, dict):
        raise InputError("must hold a JSON object", where=TOKENIZER_CONFIG)
    return json.dumps(without_code_keys(content)[0]).encode()
