"""What a GGUF file's header says of the tokenizer, and the tokenizers that llama.cpp does not have.

Byte-level BPE is here; BPE of SentencePiece's kind, which falls back to bytes, is in `sentencepiece_keys.py`.

llama.cpp has the regular expressions of pre-tokenizers built in, under names. Its converter finds the name by a hash of
the tokens of one text; here the structure of tokenizer.json says which one it is. The reference is
`src/llama-vocab.cpp` as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qexport.errors import CompatibilityError, InputError, listed
from qexport.export.gguf.sentencepiece_keys import SentencePieceKeys
from qexport.formats.gguf.header import Value
from qexport.formats.gguf.pre_tokenizers import PreTokenizer, pre_tokenizer
from qexport.text.file_names import GENERATION_CONFIG, TOKENIZER_CONFIG
from qexport.text.tokenizers import json_object, stored_templates

_FILE: Final = "tokenizer.json"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_MEND: Final = "leave the layout gguf out; the other layouts carry every tokenizer"
_PHI3: Final = re.compile("phi-?3", re.IGNORECASE)
_ROLES: Final = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as llama.cpp has it.

    Attributes:
        values: of the header, by key, in the order of the file.
        notes: what users should know.
        strips: white space behind special tokens is dropped.
    """

    values: Mapping[str, Value]
    notes: tuple[str, ...]
    strips: bool = False

    def model_name(self, name: str) -> str:
        """A name by which llama.cpp strips as the tokenizer does: it does so for names with `phi3`, and fails to load
        such a file if the tokenizer is another one.

        Args:
            name: the model's.
        """
        if self.strips:
            return name if _PHI3.search(name) else f"{name} (Phi-3)"
        return _PHI3.sub("Phi 3", name)


def gguf_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], rows: int, *, inexact: bool = False
) -> GgufTokenizer:
    """Reads tokenizer.json, tokenizer_config.json, the chat templates and generation_config.json.

    Args:
        files: of the model, by name.
        config: the content of config.json.
        rows: of the input embedding.
        inexact: whether llama.cpp may make other tokens of texts with certain spaces.

    Raises:
        CompatibilityError: llama.cpp has no such tokenizer.
        InputError: a file is malformed.
    """
    if _FILE not in files:
        raise CompatibilityError(
            f"the model has no {_FILE}",
            where="export: gguf",
            mend="save the tokenizer with transformers: tokenizer.save_pretrained(FOLDER)",
        )
    try:
        return _converted(files, config, rows, inexact=inexact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the tokenizer is malformed: {error!r}", where=_FILE) from error


def _converted(files: Mapping[str, bytes], config: Mapping[str, Any], rows: int, *, inexact: bool) -> GgufTokenizer:
    content, settings = json_object(files, _FILE), json_object(files, TOKENIZER_CONFIG)
    own = SentencePieceKeys(content) if content["model"].get("byte_fallback") else _ByteLevelKeys(content)
    affixes = _affixes(content.get("post_processor"))
    problems = [*own.problems(inexact=inexact), *_affix_problems(affixes, settings)]
    if problems or affixes is None:
        raise _refused(problems)
    texts, kinds = _tokens(content, rows)
    special, further = _special_tokens(content, settings, config, json_object(files, GENERATION_CONFIG), rows)
    if affixes.first is not None:
        special["bos"] = affixes.first
    if isinstance(own, SentencePieceKeys) and own.unknown is not None:
        special.setdefault("unknown", own.unknown)
    if "eos" not in special:
        raise _refused(["no token ends a text, and llama.cpp would take one of its own"])
    if affixes.last not in (None, special["eos"]):
        raise _refused(["the token behind a text is not eos_token, and llama.cpp would put that one there"])
    values: dict[str, Value] = {
        **own.values(texts, kinds),
        **{f"{role}_token_id": token for role, token in special.items()},
        "add_bos_token": affixes.first is not None,
        "add_eos_token": affixes.last is not None,
    }
    notes = [*_notes(further), *own.notes]
    if isinstance(own, SentencePieceKeys):
        values["add_space_prefix"] = own.add_space_prefix
        notes += own.class_notes(settings)
    keys: dict[str, Value] = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return GgufTokenizer(keys | _templates(files), tuple(notes), bool(own.strips))


def _refused(problems: Sequence[str]) -> CompatibilityError:
    return CompatibilityError(
        "llama.cpp does not have the model's tokenizer", where=f"{_FILE}: {listed(list(problems))}", mend=_MEND
    )


class _ByteLevelKeys:
    """A byte-level tokenizer, by the content of tokenizer.json."""

    strips = False

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._known = pre_tokenizer(content.get("pre_tokenizer"))

    def problems(self, *, inexact: bool) -> Iterator[str]:
        """Why llama.cpp would make other tokens; nothing here is inexact."""
        yield from _model_problems(self._content, self._known)
        yield from _added_problems(self._content)
        if self._known is None:
            yield "pre_tokenizer: llama.cpp has none of this structure, or none that was tried"

    @property
    def notes(self) -> Iterator[str]:
        """What users should know."""
        if self._content.get("normalizer") is not None:
            yield "llama.cpp does not normalize text: give it text in NFC"

    def values(self, texts: Sequence[str], kinds: Sequence[int]) -> dict[str, Value]:
        """Values of the header by key, in the order of the file."""
        assert self._known is not None
        merges = self._content["model"]["merges"]
        return {
            "model": "gpt2",
            "pre": self._known.name,
            "tokens": list(texts),
            "token_type": list(kinds),
            "merges": [each if isinstance(each, str) else " ".join(each) for each in merges],
        }


def _model_problems(content: Mapping[str, Any], known: PreTokenizer | None) -> Iterator[str]:
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        yield f"model: {model.get('type')}, and not byte-level BPE"
        return
    if model.get("dropout"):
        yield "model: dropout"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        yield "model: a prefix or suffix of words"
    if known is not None and bool(model.get("ignore_merges")) != known.ignores_merges:
        yield f"model: ignore_merges is {bool(model.get('ignore_merges'))}, and {known.name} has the opposite"
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        yield "decoder: not ByteLevel"
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        yield f"normalizer: {normalizer.get('type')}"


def _added_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for token in content.get("added_tokens", ()):
        if taken := [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]:
            yield f"added_tokens: {token['content']!r} has {' and '.join(taken)}"


@dataclass(frozen=True)
class _Affixes:
    """What is put around every text: a token before it, and one after it, or None."""

    first: int | None = None
    last: int | None = None


def _affixes(processor: Any) -> _Affixes | None:
    """None for a post-processor that does something else."""
    if processor is None or processor["type"] == "ByteLevel":
        return _Affixes()
    if processor["type"] == "Sequence":
        parts = [_affixes(each) for each in processor["processors"]]
        found = [each for each in parts if each != _Affixes()]
        return found[0] if len(found) == 1 else _Affixes() if not found else None
    if processor["type"] != "TemplateProcessing":
        return None
    single = processor["single"]
    middle = [index for index, piece in enumerate(single) if "Sequence" in piece]
    if len(middle) != 1 or middle[0] > 1 or len(single) - middle[0] > 2:
        return None
    ids = {name: token["ids"] for name, token in processor["special_tokens"].items()}
    around = [
        [ids[piece["SpecialToken"]["id"]] for piece in part] for part in (single[: middle[0]], single[middle[0] + 1 :])
    ]
    if any(len(each) != 1 for part in around for each in part):
        return None
    first, last = ([each[0] for each in part] for part in around)
    return _Affixes(first[0] if first else None, last[0] if last else None)


def _affix_problems(affixes: _Affixes | None, settings: Mapping[str, Any]) -> Iterator[str]:
    """Other tokens than tokenizer.json says, which transformers puts around a text if tokenizer_config.json says so."""
    if affixes is None:
        yield "post_processor: not one token before a text and one after it at most"
        return
    for key, token in (("add_bos_token", affixes.first), ("add_eos_token", affixes.last)):
        if settings.get(key) not in (None, token is not None):
            yield f"post_processor: {key} of {TOKENIZER_CONFIG} says something else"


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each row of the embedding; rows without a token get a name that no text has."""
    vocabulary: dict[int, str] = {number: text for text, number in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(vocabulary, _NORMAL)
    for token in content.get("added_tokens", ()):
        vocabulary[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    if max(vocabulary, default=-1) >= rows:
        raise _refused([f"a token has the number {max(vocabulary)}, and the embedding {rows} rows"])
    texts = [vocabulary.get(row, f"[PAD{row}]") for row in range(rows)]
    if len(set(texts)) < rows or "" in texts:
        raise _refused(["two tokens have the same text, or one has none"])
    return texts, [kinds.get(row, _UNUSED) for row in range(rows)]


def _special_tokens(
    content: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    rows: int,
) -> tuple[dict[str, int], int]:
    """The numbers of special tokens by their role in the header: the tokenizer's, else those of config.json; and how
    many tokens more end a text. Numbers without a row of the embedding, such as -1, stand for no token.
    """
    numbers = dict(content["model"]["vocab"])
    numbers |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    found: dict[str, int] = {}
    for role, name in _ROLES.items():
        text = settings.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        if isinstance(text, str) and text in numbers:
            found[role] = numbers[text]
        elif own := _all(config.get(f"{name}_id"), rows):
            found[role] = own[0]
    ends = [each for each in _all(generation.get("eos_token_id"), rows) if each != found.get("eos")]
    if "eos" not in found and ends:
        found["eos"] = ends.pop(0)
    if ends:
        found["eot"] = ends[0]
    return found, len(ends[1:])


def _all(value: Any, rows: int) -> list[int]:
    numbers = value if isinstance(value, list) else [value]
    return [each for each in numbers if type(each) is int and 0 <= each < rows]


def _templates(files: Mapping[str, bytes]) -> dict[str, Value]:
    """The chat templates of the first file that has any, as transformers takes them."""
    named = next(iter(stored_templates(files).values()), {})
    texts = {name: content.decode("utf-8") for name, content in named.items()}
    main = {"tokenizer.chat_template": texts.pop("default")} if "default" in texts else {}
    others: dict[str, Value] = {f"tokenizer.chat_template.{name}": text for name, text in texts.items()}
    listing: dict[str, Value] = {"tokenizer.chat_templates": list(texts)} if texts else {}
    return {**main, **listing, **others}


def _notes(further: int) -> Iterator[str]:
    if further:
        yield f"generation_config.json ends a text at {further + 2} tokens; the file names two of them"
