"""Whose tokenizer a merged model gets: the base's, or the adapter's where the training added tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import InputError
from qexport.loading.small_files import has_tokenizer, tokenizer_from_files
from qexport.text.file_names import CHAT_TEMPLATE, GENERATION_CONFIG, OLD_TEMPLATE
from qexport.text.tokenizers import json_object

_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPY = "copy the tokenizer of the training into the adapter's folder: tokenizer.save_pretrained(FOLDER)"


@dataclass(frozen=True)
class TokenizerChoice:
    """The small files of a merged model.

    Attributes:
        files: the tokenizer's files, the chat template and generation_config.json.
        config: the content of config.json, with the special tokens of the tokenizer.
        notes: what a user should know.
    """

    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with these files."""
        old = checkpoint.architecture
        own = {**old.config, **{key: self.config[key] for key in _SPECIAL if key in self.config}}
        return replace(checkpoint, files=self.files, architecture=Architecture(own, like=old))


def choose_tokenizer(
    merged: Checkpoint, beside: Mapping[str, bytes], trained: set[int], *, rows_before: int
) -> TokenizerChoice:
    """The base's tokenizer, or all of the adapter's if that has tokens which the base's lacks, or if only that fits.

    With the adapter's tokenizer its beginning, end and padding become those of config.json and generation_config.json;
    what ended a text in the base still does.

    Args:
        merged: the merged model with the base's files.
        beside: the files beside the adapter, by name.
        trained: the tokens that the adapter names as trained one by one.
        rows_before: the tokens in the base's embedding.

    Raises:
        InputError: tokens have no row, trained ones are in no tokenizer, or a tokenizer cannot be read.
    """
    rows = merged.architecture.structure.vocab_size
    same = all(beside[name] == merged.files.get(name) for name in beside)
    if not has_tokenizer(beside) or same:
        if rows != rows_before:
            return _without_tokenizer(merged, trained, rows, grown=rows > rows_before)
        return TokenizerChoice(merged.files, merged.config, tuple(_notes(merged, beside)))
    own = _adapter_tokenizer(merged, beside)
    base = _base_tokenizer(merged)
    if base is not None and not _adds(own, base) and _size(base) <= rows:
        return TokenizerChoice(merged.files, merged.config, tuple(_notes(merged, beside)))
    if _size(own) > rows:
        raise InputError(
            f"the adapter's tokenizer has {_size(own)} tokens, and the merged model only {rows} in its embedding",
            where="load.adapter",
            mend="save the adapter once more where it was trained, with save_embedding_layers=True",
        )
    return _of_adapter(merged, beside, own, base)


def _adapter_tokenizer(merged: Checkpoint, beside: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    try:
        return tokenizer_from_files(beside, merged.config, name="load.adapter")
    except InputError as error:
        raise InputError(
            f"the tokenizer beside the adapter cannot be used: {error.what}",
            where="load.adapter",
            mend="save it once more with tokenizer.save_pretrained, or remove its files from the adapter's folder, and "
            "the base's is used",
        ) from error


def _base_tokenizer(merged: Checkpoint) -> PreTrainedTokenizerBase | None:
    if not has_tokenizer(merged.files):
        return None
    return tokenizer_from_files(merged.files, merged.config, name=merged.origin.name)


def _without_tokenizer(merged: Checkpoint, trained: set[int], rows: int, *, grown: bool) -> TokenizerChoice:
    """The base's tokenizer for a model of another size, whose adapter brings none."""
    base = _base_tokenizer(merged)
    known = 0 if base is None else _size(base)
    unknown = sorted(token for token in trained if token >= known)
    if base is not None and (known > rows or unknown):
        what = f"trains the tokens {unknown[:6]}" if unknown else f"has {rows} tokens in its embedding"
        raise InputError(
            f"the adapter {what}, it brings no tokenizer, and the base's has {known} tokens",
            where="load.adapter",
            mend=_COPY,
        )
    added = f"the adapter brings no tokenizer: the base's, with {known} tokens, is used; if tokens were added, {_COPY}"
    return TokenizerChoice(merged.files, merged.config, (added,) if grown else ())


def _of_adapter(
    merged: Checkpoint, beside: Mapping[str, bytes], own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase | None
) -> TokenizerChoice:
    files = {name: content for name, content in beside.items() if name != GENERATION_CONFIG}
    config, was = dict(merged.config), {key: getattr(base, key, None) for key in _SPECIAL}
    changed = {key: token for key in _SPECIAL if (token := getattr(own, key)) is not None and token != was[key]}
    _follow(config, changed, was)
    if GENERATION_CONFIG in merged.files:
        generation = dict(json_object(merged.files, GENERATION_CONFIG))
        _follow(generation, changed, was)
        unchanged = generation == json_object(merged.files, GENERATION_CONFIG)
        text = merged.files[GENERATION_CONFIG] if unchanged else f"{json.dumps(generation, indent=2)}\n".encode()
        files[GENERATION_CONFIG] = text
    notes = [
        f"the adapter's tokenizer is used: it has {_size(own)} tokens" + (f", the base's {_size(base)}" if base else "")
    ]
    templates = (CHAT_TEMPLATE, OLD_TEMPLATE)
    if (
        base is not None
        and base.chat_template
        and not own.chat_template
        and not any(name in files for name in templates)
    ):
        notes.append("the adapter's tokenizer has no chat template, and the base's has one that is not used")
    return TokenizerChoice(files, config, tuple(notes))


def _follow(config: dict[str, Any], changed: Mapping[str, int], was: Mapping[str, Any]) -> None:
    """Sets special tokens as the tokenizer has them. Ends are added to; what had another value than the old tokenizer
    keeps it.
    """
    for key, token in changed.items():
        value = config.get(key)
        if key == "eos_token_id":
            ends = value if isinstance(value, list) else [] if value is None else [value]
            config[key] = token if not ends else value if token in ends else [token, *ends]
        elif value == was[key]:
            config[key] = token


def _adds(own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> bool:
    return not own.get_vocab().items() <= base.get_vocab().items()


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def _notes(merged: Checkpoint, beside: Mapping[str, bytes]) -> Iterator[str]:
    """A note for each file beside the adapter that differs from the base's, which is the one that is used."""
    for name, content in merged.files.items():
        if beside.get(name, content) != content:
            yield f"the adapter's folder has another {name} than the base; the base's is used"
