"""What stands beside a model's weights: its tokenizer, its chat template, its license."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes
from qexport.errors import InputError
from qexport.tensors.strict_files import contained_path, parse_json, read_bounded
from qexport.text.file_names import CHAT_TEMPLATE, OLD_TEMPLATE, TEMPLATES_FOLDER, TOKENIZER_CONFIG

_LIMIT: Final = 1 << 27
_CARD_LIMIT: Final = 1 << 20
_FRONT: Final = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENSE: Final = re.compile(r"LICEN[SC]E.*|NOTICE.*|COPYING.*", re.IGNORECASE)
_MOST_FILES: Final = 1000


def small_file(folder: Path, name: str, *, limit: int = _LIMIT) -> bytes | None:
    """The content of a file in a folder; None if there is none.

    Raises:
        InputError: it is larger than the limit, cannot be read, or is a link that leads out of the folder.
    """
    path = contained_path(folder, name)
    if not path.is_file():
        return None
    try:
        return read_bounded(path, limit)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def json_file(folder: Path, name: str, *, limit: int = _LIMIT) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        InputError: as for `small_file`; or it is not JSON, or no object.
    """
    content = small_file(folder, name, limit=limit)
    if content is None:
        return {}
    value = parse_json(content, where=str(folder / name))
    if not isinstance(value, dict):
        raise InputError("must hold a JSON object", where=str(folder / name))
    return value


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer.

    Attributes:
        model: `BPE`, `Unigram` or another one of tokenizer.json's; the file's name where there is no tokenizer.json.
        vocabulary: tokens, with added ones; None if no file that is read says it.
        added: tokens that were added to the model's own.
        special: the texts of the special tokens, by role.
        sha256: of the file.
    """

    model: str
    vocabulary: int | None
    added: int
    special: Mapping[str, str]
    sha256: str | None

    def words(self) -> str:
        """The same for the terminal."""
        count = "" if self.vocabulary is None else f", {self.vocabulary} tokens"
        special = "".join(f", {role.removesuffix('_token')} {text!r}" for role, text in self.special.items())
        return f"{self.model}{count}{f' ({self.added} added)' if self.added else ''}{special}"


@dataclass(frozen=True)
class TemplateFacts:
    """A chat template.

    Attributes:
        place: the file that it is in.
        characters: its length.
        sha256: of its text.
        others: further templates by name.
    """

    place: str
    characters: int
    sha256: str
    others: tuple[str, ...] = ()

    def words(self) -> str:
        """The same for the terminal."""
        others = f"; also {', '.join(self.others)}" if self.others else ""
        return f"{self.characters} characters in {self.place}, sha256 {self.sha256[:12]}{others}"


@dataclass(frozen=True)
class LicenseFacts:
    """What a folder says of its license: the card's field, and the files with its text."""

    named: str | None
    files: tuple[str, ...]

    def words(self) -> str:
        """The same for the terminal."""
        return ", ".join([self.named or "the card names none", *self.files])


@dataclass(frozen=True)
class Beside:
    """Tokenizer, template and license of a folder; None for what it does not have."""

    tokenizer: TokenizerFacts | None
    template: TemplateFacts | None
    license: LicenseFacts

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def beside(folder: Path) -> Beside:
    """What stands beside the weights in a folder.

    Raises:
        InputError: a file is malformed.
    """
    config = json_file(folder, TOKENIZER_CONFIG)
    return Beside(_tokenizer(folder, config), template_of(folder, config), _license(folder))


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerFacts | None:
    special = {role: text for role in ("bos_token", "eos_token", "pad_token") if (text := _text_of(config.get(role)))}
    content = small_file(folder, "tokenizer.json")
    if content is None:
        names = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
        other = next((name for name in names if small_file(folder, name) is not None), None)
        return None if other is None else TokenizerFacts(other, None, 0, special, None)
    value = parse_json(content, where=str(folder / "tokenizer.json"))
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict):
        raise InputError("tokenizer.json has no model", where=str(folder / "tokenizer.json"))
    entries, added = model.get("vocab"), value.get("added_tokens")
    own = {text for each in added if (text := _text_of(each))} if isinstance(added, list) else set[str]()
    further = len(own - set(entries)) if isinstance(entries, dict) else 0
    count = len(entries) + further if isinstance(entries, dict | list) else None
    return TokenizerFacts(str(model.get("type", "BPE")), count, further, special, sha256_bytes(content))


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def template_of(folder: Path, config: Mapping[str, Any]) -> TemplateFacts | None:
    """The chat template of a folder, and the names of further ones.

    Args:
        folder: the model's.
        config: the content of tokenizer_config.json.
    """
    found = template_text(partial(small_file, folder))
    if found is None:
        return None
    place, text = found
    others = sorted(path.stem for path in (folder / TEMPLATES_FOLDER).glob("*.jinja"))[:_MOST_FILES]
    named = config.get("chat_template")
    if isinstance(named, list):
        shown = _main(named) if place == TOKENIZER_CONFIG else None
        others += [str(each.get("name")) for each in named if isinstance(each, Mapping) and each is not shown]
    return TemplateFacts(place, len(text), sha256_bytes(text.encode("utf-8", "surrogatepass")), tuple(others))


def template_text(find: Callable[[str], bytes | None]) -> tuple[str, str] | None:
    """The file and the text of the chat template, in the order in which transformers looks for it.

    Args:
        find: gives the content of a file by its name; None if there is none.

    Raises:
        InputError: a file is not JSON.
    """
    if (content := find(CHAT_TEMPLATE)) is not None:
        return CHAT_TEMPLATE, content.decode("utf-8", errors="replace")
    for name in (OLD_TEMPLATE, TOKENIZER_CONFIG):
        content = find(name)
        value = None if content is None else parse_json(content, where=name)
        named = value.get("chat_template") if isinstance(value, dict) else None
        if isinstance(named, list) and (main := _main(named)) is not None:
            named = main.get("template")
        if isinstance(named, str):
            return name, named
    return None


def _main(listed: list[Any]) -> Mapping[str, Any] | None:
    """Of templates with names the one called `default`, else the first."""
    found = [each for each in listed if isinstance(each, Mapping)]
    return next((each for each in found if each.get("name") == "default"), found[0] if found else None)


def _license(folder: Path) -> LicenseFacts:
    names = sorted(path.name for path in folder.iterdir() if _LICENSE.fullmatch(path.name))[:_MOST_FILES]
    card = card_fields(folder)
    return LicenseFacts(card.get("license_name") or card.get("license"), tuple(names))


def card_fields(folder: Path) -> dict[str, str]:
    """The fields with one value at the top level of the model card's front matter."""
    content = small_file(folder, "README.md", limit=_CARD_LIMIT)
    front = _FRONT.match(content.decode("utf-8", errors="replace").replace("\r\n", "\n")) if content else None
    lines = front[1].split("\n") if front else []
    pairs = (line.partition(":") for line in lines if line[:1].isalpha())
    return {key: text for key, _, value in pairs if (text := value.strip().strip("\"'"))}
