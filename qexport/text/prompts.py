"""Prompts that both models continue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qexport.errors import InputError, listed
from qexport.text.chat import render_chat
from qexport.text.json_lines import read_json_lines
from qexport.text.tokens import tokenize


@dataclass(frozen=True)
class Prompt:
    """A prompt with a name of its own."""

    id: str
    prompt: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file: `id` and `prompt` in each line, other fields are passed over.

    Raises:
        InputError: the file cannot be read or is empty, a field is missing, blank or no text, or an id comes twice.
    """
    prompts: dict[str, Prompt] = {}
    for where, row in read_json_lines(path):
        for field in ("id", "prompt"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InputError(f"each prompt needs the field {field!r}, a text that is not blank", where=where)
        if row["id"] in prompts:
            raise InputError(f"the id {row['id']!r} comes twice", where=where, mend="give each prompt an id of its own")
        prompts[row["id"]] = Prompt(row["id"], row["prompt"])
    if not prompts:
        raise InputError("there are no prompts in it", where=str(path))
    return list(prompts.values())


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The prompt's tokens, through the model's chat template where it has one."""
    if tokenizer.chat_template:
        return tokenize(tokenizer, render_chat(tokenizer, prompt.prompt, reply=True), special_tokens=False)
    return tokenize(tokenizer, prompt.prompt, special_tokens=True)


def refuse_long(
    prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, positions: int | None, max_new_tokens: int
) -> None:
    """Holds each prompt with its continuation against the positions that the model has learned, where it has.

    Raises:
        InputError: prompts are too long; all of them are listed.
    """
    if positions is None:
        return
    lengths = {prompt.id: len(encode_prompt(tokenizer, prompt)) for prompt in prompts}
    too_long = [f"{name}: {length} tokens" for name, length in lengths.items() if length + max_new_tokens > positions]
    if too_long:
        raise InputError(
            f"with {max_new_tokens} new tokens, prompts are longer than the {positions} positions of the model",
            where=listed(too_long),
            mend="shorten them, or lower verify.max_new_tokens",
        )
