"""The artifact's tokenizer compared with the base's, before any model runs.

A tokenizer that differs makes every other figure meaningless, and finding it is cheap: no weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from qexport.artifact.figures import CheckResult
from qexport.errors import InputError
from qexport.text.file_names import GENERATION_CONFIG
from qexport.text.prompts import Prompt
from qexport.text.tokenizers import json_object, render_chat, stored_templates, tokenize
from qexport.text.torture import TORTURE

_EXAMPLES: Final = 3
"""How many differences a check's detail names."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer, and the files of the folder that it was opened from.

    Attributes:
        tokenizer: None if the folder has none.
        files: tokenizer, chat template and generation config by name, byte for byte.
        config: the content of config.json.
    """

    tokenizer: PreTrainedTokenizerBase | None
    files: Mapping[str, bytes]
    config: Mapping[str, Any]


def preflight(
    base: TokenizerFolder,
    artifact: TokenizerFolder,
    *,
    prompts: Sequence[Prompt],
    embedding_rows: int,
    texts: Sequence[str] = (),
) -> list[CheckResult]:
    """Compares two tokenizers in every way that changes what a model sees, or when it stops.

    - `vocabulary`: each token has the same id in both, and both have equally many tokens.
    - `embedding`: each of the artifact's tokens has a row in the embedding. Tokens that have no row in the base either
      are named and do not fail the check, since the export did not change them.
    - `special_tokens`: the same tokens mean beginning, end, padding and so on, and all added tokens are matched in text
      by the same rules.
    - `end_token`: the artifact's end-of-text token encodes to itself alone, equals the base's, and is among the ends in
      generation_config.json, or in config.json if that names none; each file names the same ends as the base's.
    - `padding_side`: the same.
    - `chat_template`: byte for byte the same, in every file that contains one.
    - `token_ids`: the same ids for every prompt, plain and through the base's chat template, for the held-out text, for
      every text in `TORTURE`, and for texts around each added token.
    - `decoding`: these ids turn into the same text in both, with and without special tokens.

    Args:
        base: the base's, or the merged reference's.
        artifact: the artifact's.
        prompts: encoded in addition to the texts in `TORTURE`.
        embedding_rows: rows of the input embedding.
        texts: the held-out text that the windows were cut from.

    Returns:
        The checks in the order above. If the base has no tokenizer, none is measured; if only the artifact has none,
        all of them fail.

    Raises:
        InputError: a JSON file among the files is malformed.
    """
    if base.tokenizer is None:
        return [_check(name, None, "not measured: the base has no tokenizer") for name in CHECKS]
    if artifact.tokenizer is None:
        return [_check(name, False, "the artifact has no tokenizer, the base has one") for name in CHECKS]
    compared = _Compared(base.tokenizer, artifact.tokenizer, base, artifact, prompts, embedding_rows, texts)
    return [_check(name, *check(compared)) for name, check in CHECKS.items()]


def refuse_contradicting_ends(base: TokenizerFolder) -> None:
    """Refuses a model whose own files do not agree on what ends a text: every artifact of it fails `end_token`.

    Raises:
        InputError: they do not agree, or a JSON file among them is malformed.
    """
    if base.tokenizer is None:
        return
    passed, detail = _end_token(_Compared(base.tokenizer, base.tokenizer, base, base, (), 0))
    if passed is False:
        raise InputError(
            f"the base's files contradict each other: {detail}",
            where="the base's tokenizer_config.json, generation_config.json and config.json",
            mend="name the tokenizer's end token in eos_token_id: a model may have several, listed in brackets",
        )


def _check(name: str, passed: bool | None, detail: str) -> CheckResult:
    return CheckResult(gate="tokenizer", name=name, passed=passed, detail=detail)


@dataclass(frozen=True)
class _Compared:
    """Both tokenizers, and the values that several checks use."""

    base: PreTrainedTokenizerBase
    artifact: PreTrainedTokenizerBase
    base_folder: TokenizerFolder
    artifact_folder: TokenizerFolder
    prompts: Sequence[Prompt]
    embedding_rows: int
    texts: Sequence[str] = ()

    @cached_property
    def vocabularies(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.base.get_vocab(), self.artifact.get_vocab()

    @cached_property
    def encoded(self) -> list[tuple[str, list[int], list[int]]]:
        """Each text's name, and its ids in both."""
        return [
            (
                name,
                tokenize(self.base, text, special_tokens=special),
                tokenize(self.artifact, text, special_tokens=special),
            )
            for name, text, special in _texts(self.base, self.prompts, self.texts)
        ]


_Finding = tuple[bool | None, str]


def _texts(
    base: PreTrainedTokenizerBase, prompts: Sequence[Prompt], held_out: Sequence[str]
) -> Iterator[tuple[str, str, bool]]:
    """A name, a text, and whether the tokenizer adds special tokens."""
    for prompt in prompts:
        yield f"the prompt {prompt.id}", prompt.shown, True
        if base.chat_template:
            try:
                yield (
                    f"the prompt {prompt.id} in the chat template",
                    render_chat(base, prompt.prompt, reply=True),
                    False,
                )
            except InputError:  # the template rejects this conversation, so no model will see it
                continue
    for number, text in enumerate(held_out, start=1):
        yield f"document {number} of the held-out text", text, True
    for name, text in TORTURE.items():
        yield f"the text {name!r}", text, True
    for token in base.added_tokens_decoder.values():
        yield f"a text with {token.content!r}", _around(token.content), True


def _around(token: str) -> str:
    return f"{token}word{token} {token}  {token}\n{token.upper()}{token[:-1]}"


def _vocabulary(compared: _Compared) -> _Finding:
    base, artifact = compared.vocabularies
    changed = sorted(token for token in base.keys() | artifact.keys() if base.get(token) != artifact.get(token))
    if changed:
        examples = [f"{token!r} is {base.get(token)}, now {artifact.get(token)}" for token in changed]
        return False, f"{len(base)} tokens, {len(artifact)} in the artifact; {_some(examples)}"
    return True, f"{len(base)} tokens with equal ids"


def _embedding(compared: _Compared) -> _Finding:
    base, artifact = compared.vocabularies
    outside = {token: number for token, number in artifact.items() if number >= compared.embedding_rows}
    added = [f"{token!r} is {number}" for token, number in outside.items() if base.get(token) != number]
    if added:
        return False, f"the embedding has {compared.embedding_rows} rows; {_some(added)}"
    if outside:
        names = _some([repr(token) for token in outside])
        return True, f"beyond the {compared.embedding_rows} rows of the embedding, as in the base: {names}"
    return (
        True,
        f"the last token is {max(artifact.values(), default=None)}, the embedding has {compared.embedding_rows} rows",
    )


def _special_tokens(compared: _Compared) -> _Finding:
    base, artifact = _special(compared.base), _special(compared.artifact)
    changed = [
        f"{name}: {base.get(name)}, now {artifact.get(name)}"
        for name in sorted(base.keys() | artifact.keys())
        if base.get(name) != artifact.get(name)
    ]
    return (False, _some(changed)) if changed else (True, f"{len(base)} special and added tokens are equal")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens by role, and each added token with the rules by which it is matched in text."""
    roles = {name: repr(str(token)) for name, token in tokenizer.special_tokens_map.items()}
    extra = {"extra_special_tokens": ", ".join(sorted(repr(str(token)) for token in tokenizer.extra_special_tokens))}
    return {**roles, **extra, **{f"token {number}": repr(t) for number, t in tokenizer.added_tokens_decoder.items()}}


def _end_token(compared: _Compared) -> _Finding:
    base, artifact = compared.base.eos_token_id, compared.artifact.eos_token_id
    if base is None and artifact is None:
        return None, "not measured: neither tokenizer has an end-of-text token"
    if not isinstance(artifact, int) or artifact != base:
        return False, f"the tokenizer's end-of-text token is {base}, now {artifact}"
    ids = tokenize(compared.artifact, str(compared.artifact.eos_token), special_tokens=False)
    if ids != [artifact]:
        return False, f"{compared.artifact.eos_token!r} is {artifact}, but encodes to {ids}"
    ends, theirs = _named_ends(compared.base_folder), _named_ends(compared.artifact_folder)
    for file, named in theirs.items():
        if named != ends[file]:
            return False, f"{file} ends with {ends[file]}, now {named}"
    deciding = next(((file, named) for file, named in theirs.items() if named), None)
    if deciding and artifact not in deciding[1]:
        return False, f"{artifact} ends a text for the tokenizer, {deciding[0]} ends with {deciding[1]}"
    return (
        True,
        f"{compared.artifact.eos_token!r} is {artifact}, as in {deciding[0] if deciding else 'the tokenizer alone'}",
    )


def _named_ends(folder: TokenizerFolder) -> dict[str, list[int]]:
    configs = {GENERATION_CONFIG: json_object(folder.files, GENERATION_CONFIG), "config.json": folder.config}
    named = {file: config.get("eos_token_id") for file, config in configs.items()}
    listed = {file: ends if isinstance(ends, list) else [ends] for file, ends in named.items()}
    return {file: sorted(end for end in ends if type(end) is int) for file, ends in listed.items()}


def _padding_side(compared: _Compared) -> _Finding:
    base, artifact = compared.base.padding_side, compared.artifact.padding_side
    return base == artifact, base if base == artifact else f"{base}, now {artifact}"


def _chat_template(compared: _Compared) -> _Finding:
    base, artifact = stored_templates(compared.base_folder.files), stored_templates(compared.artifact_folder.files)
    used = next(iter(base.values()), {})
    if not artifact and used:
        return False, "the artifact has none, the base has one"
    for file, templates in artifact.items():
        expected = base.get(file, used)
        for name in sorted(templates.keys() | expected.keys()):
            if templates.get(name) != expected.get(name):
                return False, f"{file}, {name}: {_first_byte(expected.get(name), templates.get(name))}"
    if compared.base.chat_template != compared.artifact.chat_template:
        return False, "the files are equal, but the tokenizers do not take the same one"
    return True, f"equal in {', '.join(artifact)}" if artifact else "neither has one"


def _first_byte(base: bytes | None, artifact: bytes | None) -> str:
    if base is None or artifact is None:
        return "only the artifact has it" if base is None else "only the base has it"
    pairs = enumerate(zip_longest(base, artifact))
    return f"the bytes differ from byte {next(index for index, (own, other) in pairs if own != other)}"


def _token_ids(compared: _Compared) -> _Finding:
    changed = []
    for name, base, artifact in compared.encoded:
        if base != artifact:
            index = next(i for i, (own, other) in enumerate(zip_longest(base, artifact)) if own != other)
            changed.append(f"{name}: token {index} is {base[index:][:1]}, now {artifact[index:][:1]}")
    return _all_equal(changed, len(compared.encoded))


def _decoding(compared: _Compared) -> _Finding:
    changed = []
    for name, base, artifact in compared.encoded:
        for skip in (False, True):
            own = compared.base.decode(base, skip_special_tokens=skip)
            other = compared.artifact.decode(artifact, skip_special_tokens=skip)
            if own != other:
                changed.append(f"{name}: {_shortened(own)}, now {_shortened(other)}")
                break
    return _all_equal(changed, len(compared.encoded))


def _all_equal(changed: Sequence[str], total: int) -> _Finding:
    if changed:
        return False, f"{len(changed)} of {total} texts differ; {_some(changed)}"
    return True, f"{total} texts are equal"


def _some(examples: Sequence[str]) -> str:
    more = [f"and {len(examples) - _EXAMPLES} more"] if len(examples) > _EXAMPLES else []
    return "; ".join([*examples[:_EXAMPLES], *more])


def _shortened(text: Any) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


CHECKS: Final[Mapping[str, Callable[[_Compared], _Finding]]] = {
    "vocabulary": _vocabulary,
    "embedding": _embedding,
    "special_tokens": _special_tokens,
    "end_token": _end_token,
    "padding_side": _padding_side,
    "chat_template": _chat_template,
    "token_ids": _token_ids,
    "decoding": _decoding,
}
"""The checks by name, in their order."""
