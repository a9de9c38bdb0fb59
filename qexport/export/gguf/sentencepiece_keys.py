"""What a GGUF file's header says of a tokenizer of SentencePiece's kind.

llama.cpp's converter takes scores from SentencePiece's own file where there is one; here they are the places of merges
in tokenizer.json, which are the same numbers for files that were made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from qexport.formats.gguf.header import Value
from qexport.formats.gguf.sentencepiece import BYTES, SPACE, Joins, joins, spaces, strips_behind

TOKENS, SCORES, TOKEN_TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_NORMAL, _UNKNOWN, _UNUSED, _BYTE = 1, 2, 5, 6
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0

_CLASS_NOTE: Final = (
    "transformers reads tokenizers of the class LlamaTokenizer in another way than tokenizer.json has them: it puts no "
    "space before a text that begins with one; llama.cpp does"
)
_STRIP_NOTE: Final = "behind special tokens llama.cpp drops white space of ASCII alone"


class SentencePieceKeys:
    """A tokenizer of SentencePiece's kind.

    Args:
        content: of tokenizer.json.

    Attributes:
        strips: white space behind special tokens is dropped, as llama.cpp does for Phi 3.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._model, self._added = content["model"], content.get("added_tokens", ())
        self._spaces = spaces(content)
        self.strips = strips_behind(self._added)
        special = {token["content"] for token in self._added if token.get("special")}
        self._apart = special | {text for token in self._added if SPACE not in (text := token["content"])}
        self._joins = joins(self._model, self._apart) if "merges" in self._model else Joins({}, ())

    def problems(self, *, inexact: bool) -> Iterator[str]:
        """Why llama.cpp would make other tokens.

        Args:
            inexact: whether it may do so for texts with certain spaces.
        """
        model = self._model
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            yield f"model: {model.get('type')}, and not BPE"
        if model.get("dropout") or model.get("ignore_merges"):
            yield "model: dropout or ignore_merges"
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            yield "model: a prefix or suffix of words"
        if missing := [text for text in BYTES if text not in model["vocab"]]:
            yield f"model: byte_fallback, and there is no token {missing[0]}"
        yield from self._joins.problems
        if self._spaces is None:
            yield "normalizer, pre_tokenizer and decoder: not those of SentencePiece's BPE, which byte_fallback is for"
        yield from self._added_problems()
        if not inexact:
            yield from (f"{each} (inexact: allow takes that)" for each in self._differences())

    def _differences(self) -> Iterator[str]:
        """In which texts llama.cpp makes other tokens."""
        if self._spaces is not None and not self._spaces.exact:
            yield (
                "pre_tokenizer: Metaspace puts a space before a text only where there is none; llama.cpp does before "
                "every text and behind every special token"
            )
        if found := [token["content"] for token in self._added if token["content"] not in self._apart]:
            yield (
                f"added_tokens: {found[0]!r} is also found in a text that has the sign {SPACE} itself; llama.cpp joins "
                "it from spaces alone"
            )

    def _added_problems(self) -> Iterator[str]:
        prefix = self._spaces is not None and self._spaces.prefix and self._spaces.exact
        if self.strips is None:
            yield "added_tokens: rstrip, and not of all tokens but <unk>, <s> and <|endoftext|> as for Phi 3"
        for token in self._added:
            text = token["content"]
            if taken := [key for key in ("lstrip", "single_word") if token.get(key)]:
                yield f"added_tokens: {text!r} has {' and '.join(taken)}"
            if prefix and token.get("normalized"):
                yield f"added_tokens: {text!r} is normalized, and so not found inside a text"
            if text not in self._apart and text not in self._joins.places:
                yield f"added_tokens: {text!r} has a sign for a space, and no merges make it"

    @property
    def notes(self) -> Iterator[str]:
        """What users should know."""
        yield from (f"the tokenizer is not quite llama.cpp's: {each}" for each in self._differences())
        if self.strips:
            yield _STRIP_NOTE

    def class_notes(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """The same of what tokenizer_config.json says.

        Args:
            settings: its content.
        """
        named = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
        if named == "LlamaTokenizer" and self._spaces is not None and self._spaces.prefix and self._spaces.exact:
            yield _CLASS_NOTE

    def values(self, texts: Sequence[str], kinds: Sequence[int]) -> dict[str, Value]:
        """Values of the header by key, in the order of the file.

        Args:
            texts: of the tokens, by number.
            kinds: as of a byte-level tokenizer.
        """
        own = [self._kind(text, kind) for text, kind in zip(texts, kinds, strict=True)]
        return {
            "model": "llama",
            "pre": "default",
            "tokens": list(texts),
            "scores": self._scores(texts, own),
            "token_type": own,
        }

    def _kind(self, text: str, kind: int) -> int:
        """An added token that has a sign for a space is joined like others: llama.cpp would look for it in the text."""
        if kind == _NORMAL and text in BYTES:
            return _BYTE
        if kind == _NORMAL and text == self._model.get("unk_token"):
            return _UNKNOWN
        return kind if kind == _UNUSED or text in self._apart else _NORMAL

    def _scores(self, texts: Sequence[str], kinds: Sequence[int]) -> list[float]:
        """Less for a token that is made later; single characters, which nothing makes, are the last ones."""
        places = self._joins.places
        rest, found = len(places), list[float]()
        for text, kind in zip(texts, kinds, strict=True):
            if kind == _NORMAL:
                found.append(-float(places.get(text, rest)))
                rest += text not in places
            else:
                found.append({_UNUSED: _UNUSED_SCORE, _BYTE: 0.0, _UNKNOWN: 0.0}.get(kind, _ADDED_SCORE))
        return found

    @property
    def unknown(self) -> int | None:
        """The number of the token for what is no token; llama.cpp takes 0 where a file names none."""
        found = self._model["vocab"].get(self._model.get("unk_token"))
        return None if found is None else int(found)

    @property
    def add_space_prefix(self) -> bool:
        """Whether a space is put before a text."""
        return self._spaces is not None and self._spaces.prefix


def same_vocabulary(found: Mapping[str, Sequence[Any]], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of another program's file by which llama.cpp makes the same tokens as by others.

    Added tokens may have spaces for their signs, and any score and type; of scores only the order of tokens that are
    made from others counts.

    Args:
        found: the file's arrays, by key.
        wanted: the values of this layout, by key.
    """
    same = {TOKEN_TYPES: found[TOKEN_TYPES]} if TOKEN_TYPES in found else {}
    tokens = found.get(TOKENS, ())
    if [str(text).replace(" ", SPACE) for text in tokens] == [text.replace(" ", SPACE) for text in wanted[TOKENS]]:
        same[TOKENS] = tokens
        scores, kinds = found.get(SCORES, ()), found.get(TOKEN_TYPES, wanted[TOKEN_TYPES])
        made = [
            token
            for token, kind in enumerate(wanted[TOKEN_TYPES])
            if kind == kinds[token] == _NORMAL and len(wanted[TOKENS][token]) > 1
        ]
        made.sort(key=lambda token: -wanted[SCORES][token])
        if len(scores) == len(tokens) and all(scores[one] > scores[two] for one, two in pairwise(made)):
            same[SCORES] = scores
    return same
