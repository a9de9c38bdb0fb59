"""Prompts that both models continue."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

from transformers import PreTrainedTokenizerBase

from qexport.artifact.digests import sha256_json
from qexport.errors import InputError, listed
from qexport.text.documents import Document, as_document, encodable, read_json_lines
from qexport.text.tokenizers import render_chat, tokenize

Style = Literal["clean", "messy"]
"""Well written, or as typed in a hurry."""

NO_DOMAIN: Final = "unnamed"
"""The domain of prompts that do not name one."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with a unique id.

    Attributes:
        id: unique in its set.
        prompt: a text, which may be empty, or a conversation that ends with a user's message.
        domain: its subject; reports give figures by domain.
        style: how it is written.
        pair: the name that the clean and the messy form of one request share; None for a prompt without a counterpart.
    """

    id: str
    prompt: Document
    domain: str = NO_DOMAIN
    style: Style = "clean"
    pair: str | None = None

    @property
    def shown(self) -> str:
        """The prompt for display. Models see a conversation only through their chat template."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: with unique ids; each pair has one clean and one messy prompt, both of one domain.
        origin: the file's name, without any path of this machine.
    """

    prompts: tuple[Prompt, ...]
    origin: str

    @cached_property
    def sha256(self) -> str:
        """Hex digest of ids, domains, styles, pairs and prompts in their order, regardless of other fields."""
        return sha256_json([sha256_json(_identity(prompt)) for prompt in self.prompts])


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the model sees them.

    Attributes:
        prompt_set: all of them.
        prompts: those that the model can continue, in the set's order.
        input_ids: the tokens of each, at least one.
        skipped: why the others cannot be continued, by their ids.
    """

    prompt_set: PromptSet
    prompts: tuple[Prompt, ...]
    input_ids: tuple[list[int], ...]
    skipped: Mapping[str, str]


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a JSONL file.

    Each line has `id`, and either `prompt`, a text, or `messages`. It may have `domain`, `style` and `pair`; other
    fields are ignored.

    Raises:
        InputError: the file cannot be read or is empty, a field is missing or of the wrong type, an id is used twice, a
            conversation does not end with the user, or a pair is not one clean and one messy prompt of one domain;
            with file and line.
    """
    prompts: list[Prompt] = []
    pairs: dict[str, list[tuple[str, Prompt]]] = defaultdict(list)
    for where, _, prompt in prompt_rows(path):
        prompts.append(prompt)
        if prompt.pair is not None:
            pairs[prompt.pair].append((where, prompt))
    for name, members in pairs.items():
        _check_pair(name, members)
    return PromptSet(tuple(prompts), path.name)


def prompt_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any], Prompt]]:
    """Each line's place, its fields, and its prompt.

    Raises:
        InputError: the file cannot be read or is empty, a field is missing or of the wrong type, an id is used twice,
            or a conversation does not end with the user; with file and line.
    """
    seen: set[str] = set()
    for where, row in read_json_lines(path):
        prompt = _prompt(row, where)
        if prompt.id in seen:
            raise InputError(f"the id {prompt.id!r} is used twice", where=where, mend="give each prompt its own id")
        seen.add(prompt.id)
        yield where, row, prompt
    if not seen:
        raise InputError("it contains no prompts", where=str(path))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """The prompt's tokens, through the model's chat template if it has one.

    With a template an empty prompt is an empty message. Without one it has no tokens, but a model needs at least one
    token to continue. It becomes the beginning-of-text token, or the end-of-text token if the tokenizer has no other:
    the token that precedes a new text in training.

    Args:
        tokenizer: the model's.
        prompt: a text or a conversation.
        tools: functions that the model may call, as chat templates take them; None for none.

    Raises:
        InputError: a conversation or tools without a chat template (any rendering of them would be invented), a
            template that rejects the conversation or does not name the tools, or an empty prompt and a tokenizer
            with neither of these tokens.
    """
    if tokenizer.chat_template:
        text = render_chat(tokenizer, prompt.prompt, reply=True, tools=tools)
        if tools is not None and text == render_chat(tokenizer, prompt.prompt, reply=True):
            raise InputError("the chat template does not name the tools", where=prompt.id)
        return tokenize(tokenizer, text, special_tokens=False)
    if tools is not None:
        raise InputError("tools need a chat template, and the tokenizer has none", where=prompt.id)
    if not isinstance(prompt.prompt, str):
        raise InputError("a conversation needs a chat template, and the tokenizer has none", where=prompt.id)
    ids = tokenize(tokenizer, prompt.prompt, special_tokens=True)
    if ids:
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return [token]
    raise InputError("an empty prompt needs a token to begin with, and the tokenizer has none", where=prompt.id)


def encode_prompts(
    prompt_set: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    tools: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> EncodedPrompts:
    """Encodes the prompts that `encode_prompt` can encode; the others are skipped, and listed with the reason.

    Args:
        prompt_set: the prompts.
        tokenizer: the model's.
        tools: what the model may call, by the prompt's id.

    Raises:
        InputError: none of them can be encoded.
    """
    encoded: list[tuple[Prompt, list[int]]] = []
    skipped: dict[str, str] = {}
    for prompt in prompt_set.prompts:
        try:
            encoded.append((prompt, encode_prompt(tokenizer, prompt, tools.get(prompt.id))))
        except InputError as error:
            skipped[prompt.id] = error.what
    if not encoded:
        raise InputError(
            "the model can continue none of the prompts",
            where=listed([f"{name}: {reason}" for name, reason in skipped.items()]),
            mend="name prompts that are texts, or a model with a chat template",
        )
    prompts, input_ids = zip(*encoded, strict=True)
    return EncodedPrompts(prompt_set, prompts, input_ids, skipped)


def refuse_long(
    encoded: EncodedPrompts, positions: int | None, max_new_tokens: int, setting: str = "verify.max_new_tokens"
) -> None:
    """Checks that each prompt and its continuation fit into the learned positions of the model, if it has such.

    Raises:
        InputError: prompts are too long; all of them are listed.
    """
    if positions is None:
        return
    lengths = [(prompt.id, len(ids)) for prompt, ids in zip(encoded.prompts, encoded.input_ids, strict=True)]
    too_long = [f"{name}: {length} tokens" for name, length in lengths if length + max_new_tokens > positions]
    if too_long:
        raise InputError(
            f"with {max_new_tokens} new tokens, prompts exceed the {positions} positions of the model",
            where=listed(too_long),
            mend=f"shorten them, or lower {setting}",
        )


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    style = row.get("style", "clean")
    if style not in get_args(Style):
        raise InputError(f"the style must be one of {', '.join(get_args(Style))}, not {style!r}", where=where)
    return Prompt(
        id=_name(row, "id", where),
        prompt=_request(row, where),
        domain=_name(row, "domain", where) if "domain" in row else NO_DOMAIN,
        style=cast(Style, style),
        pair=_name(row, "pair", where) if row.get("pair") is not None else None,
    )


def _name(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"the field {field!r} must be a text that is not blank", where=where)
    return encodable(value, where)


def _request(row: Mapping[str, Any], where: str) -> Document:
    if "prompt" in row and "messages" in row:
        raise InputError("the line has both a prompt and messages", where=where, mend="keep one of them")
    document = as_document(row, "prompt", where)
    if not isinstance(document, str) and document[-1]["role"] != "user":
        raise InputError(
            f"the last message must be the user's, not that of {document[-1]['role']!r}",
            where=where,
            mend="end with what the model is to answer",
        )
    return document


def _check_pair(name: str, members: Sequence[tuple[str, Prompt]]) -> None:
    where = members[-1][0]
    styles = sorted(prompt.style for _, prompt in members)
    if styles != ["clean", "messy"]:
        raise InputError(
            f"the pair {name!r} must be one clean and one messy prompt, it is: {', '.join(styles)}", where=where
        )
    domains = {prompt.domain for _, prompt in members}
    if len(domains) > 1:
        raise InputError(
            f"the two prompts of the pair {name!r} are of the domains {' and '.join(sorted(domains))}", where=where
        )


def _identity(prompt: Prompt) -> list[Any]:
    return [prompt.id, prompt.domain, prompt.style, prompt.pair, prompt.prompt]
