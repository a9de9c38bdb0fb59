"""The files of a tokenizer compared as a whole, section by section and key by key.

Each runtime reads other parts of them: TGI's router and llama.cpp's converter open tokenizer.json themselves, so what
transformers ignores or overrides there (truncation, padding) still changes what users get. Chat templates and the
tokenizers as loaded are compared by `qexport.text.preflight`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qexport.artifact.figures import CheckResult
from qexport.errors import InputError
from qexport.text.file_names import TOKENIZER_CONFIG
from qexport.text.preflight import TokenizerFolder
from qexport.text.tokenizers import json_object

_FAST: Final = "tokenizer.json"
_SPECIAL: Final = "special_tokens_map.json"
_LENGTH_STATES: Final = ("truncation", "padding")
"""Sections that transformers changes in memory with each call."""

_OF_THE_WRITER: Final = frozenset(
    {
        "transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "tokenizer_file", "vocab_file",
        "merges_file", "special_tokens_map_file", "processor_class", "backend", "is_local", "local_files_only",
    }
)  # fmt: skip
"""Keys by which no runtime tokenizes: what wrote the files, and from where."""

_COMPARED_AS_LOADED: Final = frozenset(
    {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"}
)
"""Keys that have several forms; `preflight` compares what they mean."""

_ABSENT: Final = object()
_EXAMPLES: Final = 5
"""How many differences a check's detail names."""


def compare_tokenizer_files(base: TokenizerFolder, artifact: TokenizerFolder) -> list[CheckResult]:
    """One check for each file of a tokenizer that the artifact or the base has, in the gate `files`.

    - `tokenizer.json`: every section, as the library `tokenizers` writes it (version 0.23). A section may also be what
      transformers makes of the base's, which it writes when it saves the tokenizer again.
    - `tokenizer_config.json`: every key that changes tokens. A key that only one file has must be what the other
      tokenizer has as loaded.
    - `special_tokens_map.json` by role, `added_tokens.json` and `vocab.json` by token, `merges.txt` by merge; those
      that only the artifact has must be what the base's tokenizer.json says.
    - `tokenizer.model` and `spiece.model`: byte for byte.

    Args:
        base: the base's, or the merged reference's.
        artifact: the artifact's.

    Raises:
        InputError: a JSON file among the files is malformed.
    """
    if base.tokenizer is None or artifact.tokenizer is None:  # the gate `tokenizer` says so
        return []
    names = [name for name in _FILES if name in artifact.files or (name in base.files and name in _ALWAYS)]
    return [_check(name, _compared(name, base, artifact)) for name in names]


def _check(name: str, problems: list[str]) -> CheckResult:
    more = [f"and {len(problems) - _EXAMPLES} more"] if len(problems) > _EXAMPLES else []
    detail = "; ".join([*problems[:_EXAMPLES], *more]) or "as in the reference"
    return CheckResult(gate="files", name=name, passed=not problems, detail=detail)


def _compared(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> list[str]:
    if name in base.files and base.files[name] == artifact.files.get(name):
        return []
    return list(_FILES[name](name, base, artifact))


def _fast(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    assert base.tokenizer is not None
    loaded, wanted = _backend(base.tokenizer), _sections(name, base)
    found = _sections(name, artifact)
    for section in sorted(wanted.keys() | found.keys()):
        accepted = [wanted.get(section)] if section in _LENGTH_STATES else [wanted.get(section), loaded.get(section)]
        if found.get(section) not in accepted:
            yield _first_difference(section, wanted.get(section), found.get(section))


def _sections(name: str, folder: TokenizerFolder) -> dict[str, Any]:
    """The sections in the file; without one, those of the tokenizer as loaded, which never truncates or pads."""
    if name not in folder.files:
        assert folder.tokenizer is not None
        return _backend(folder.tokenizer) | dict.fromkeys(_LENGTH_STATES)
    try:
        parsed = json.loads(Tokenizer.from_str(folder.files[name].decode("utf-8")).to_str())
    except Exception as error:  # tokenizers raises plain exceptions
        raise InputError(f"tokenizers cannot read it: {error}", where=name) from error
    assert isinstance(parsed, dict)
    return parsed


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


def _first_difference(place: str, base: Any, artifact: Any) -> str:
    """The innermost place at which two JSON values differ, with both values."""
    if isinstance(base, dict) and isinstance(artifact, dict):
        key = next(key for key in sorted(base.keys() | artifact.keys()) if base.get(key) != artifact.get(key))
        return _first_difference(f"{place}.{key}", base.get(key), artifact.get(key))
    if isinstance(base, list) and isinstance(artifact, list):
        index = next(index for index, (own, other) in enumerate(zip_longest(base, artifact)) if own != other)
        counts = f" ({len(artifact)} entries, not {len(base)})" if len(base) != len(artifact) else ""
        own, other = (dict(enumerate(each)).get(index) for each in (base, artifact))
        return _first_difference(f"{place}[{index}]", own, other) + counts
    return f"{place} is {_shown(artifact)}, not {_shown(base)}"


def _config(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    wanted, found = json_object(base.files, name), json_object(artifact.files, name)
    for key in sorted((wanted.keys() | found.keys()) - _OF_THE_WRITER - _COMPARED_AS_LOADED):
        own, other = _plain(wanted.get(key)), _plain(found.get(key))
        if own == other or (key == "tokenizer_class" and type(base.tokenizer) is type(artifact.tokenizer)):
            continue  # classes were renamed: what counts is which one transformers takes
        if (own is not None and other is not None) or not _loaded_as(
            own or other, key, base if own is None else artifact
        ):
            yield f"{key} is {_shown(other)}, not {_shown(own)}"


def _loaded_as(value: Any, key: str, folder: TokenizerFolder) -> bool:
    """Whether a tokenizer whose file does not have the key has its value; what transformers does not know is off."""
    loaded = getattr(folder.tokenizer, key, _ABSENT)
    return not value if loaded is _ABSENT else bool(loaded == value)


def _plain(value: Any) -> Any:
    """The value; of a token with its rules, which `preflight` compares, only the text."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _special_map(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    assert base.tokenizer is not None
    loaded = {role: str(token) for role, token in base.tokenizer.special_tokens_map.items()}
    wanted = {**loaded, **json_object(base.files, name)}
    for role, token in sorted(json_object(artifact.files, name).items()):
        if role not in _COMPARED_AS_LOADED and _plain(token) != _plain(wanted.get(role)):
            yield f"{role} is {_shown(_plain(token))}, not {_shown(_plain(wanted.get(role)))}"


def _vocabulary(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    assert base.tokenizer is not None
    known, found = base.tokenizer.get_vocab(), json_object(artifact.files, name)
    wanted = json_object(base.files, name) if name in base.files else {token: known.get(token) for token in found}
    if name == "vocab.json" and name not in base.files:
        wanted = _model(base).get("vocab", wanted)
    if wanted != found:
        yield _first_difference("", wanted, found).removeprefix(".")


def _merges(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    wanted = _lines(base.files[name]) if name in base.files else [" ".join(pair) for pair in _model(base)["merges"]]
    if wanted != (found := _lines(artifact.files[name])):
        yield _first_difference("merge ", wanted, found)


def _model(folder: TokenizerFolder) -> Mapping[str, Any]:
    assert folder.tokenizer is not None
    model = _backend(folder.tokenizer).get("model", {})
    return {"vocab": {}, "merges": [], **model}


def _lines(content: bytes) -> list[str]:
    lines = content.decode("utf-8", "replace").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def _bytes(name: str, base: TokenizerFolder, artifact: TokenizerFolder) -> Iterator[str]:
    yield "the bytes differ" if name in base.files else "only the artifact has it, and some loaders prefer it"


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.120}"


_FILES: Final[Mapping[str, Callable[[str, TokenizerFolder, TokenizerFolder], Iterator[str]]]] = MappingProxyType(
    {
        _FAST: _fast,
        TOKENIZER_CONFIG: _config,
        _SPECIAL: _special_map,
        "added_tokens.json": _vocabulary,
        "vocab.json": _vocabulary,
        "merges.txt": _merges,
        "tokenizer.model": _bytes,
        "spiece.model": _bytes,
    }
)

_ALWAYS: Final = (_FAST, TOKENIZER_CONFIG)
"""Files that are compared even where the artifact has none: its tokenizer as loaded stands for them."""
