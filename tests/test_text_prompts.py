"""Prompts from JSON lines, and the tokens that a model sees of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import factories
from qexport.errors import InputError
from qexport.text.prompts import (
    Prompt,
    PromptSet,
    encode_prompt,
    encode_prompts,
    read_prompts,
    refuse_long,
)

TURNS = (
    {"role": "user", "content": "How high is it?"},
    {"role": "assistant", "content": "Nine metres."},
    {"role": "user", "content": "And wide?"},
)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_tokenizer() -> Any:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_prompts_are_read_in_their_order(tmp_path: Path) -> None:
    path = written(
        tmp_path / "prompts.jsonl",
        {"id": "b", "prompt": "Two", "domain": "x", "note": "passed over"},
        {"id": "a", "messages": list(TURNS), "style": "messy", "pair": None},
    )
    found = read_prompts(path)
    assert found.prompts == (Prompt("b", "Two", domain="x"), Prompt("a", TURNS, style="messy"))
    assert found.origin == "prompts.jsonl"


def test_a_prompt_may_be_empty_or_blank(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"id": "a", "prompt": ""}, {"id": "b", "prompt": " \n\t"})
    assert [prompt.prompt for prompt in read_prompts(path).prompts] == ["", " \n\t"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', r"'a' is used twice\n.*p\.jsonl:2"),
        ('{"prompt": "x"}', r"the field 'id' must be a text that is not blank\n.*p\.jsonl:1"),
        ('{"id": " ", "prompt": "x"}', "the field 'id'"),
        ('{"id": "\\ud800", "prompt": "x"}', "half a character"),
        ('{"id": "a"}', r"neither a field 'prompt' nor messages\n.*p\.jsonl:1"),
        ('{"id": "a", "prompt": 3}', "prompt must be a text or a list of messages, not int"),
        ('{"id": "a", "prompt": "\\ud800"}', "half a character"),
        ('{"id": "a", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "both a prompt and messages"),
        ('{"id": "a", "messages": []}', "messages must be a text or a list"),
        ('{"id": "a", "messages": [{"role": "user"}]}', "a message needs role and content"),
        ('{"id": "a", "messages": [{"role": "assistant", "content": "x"}]}', r"the user's, not.*'assistant'\n.*:1"),
        ('{"id": "a", "prompt": "x", "style": "Messy"}', r"one of clean, messy, not 'Messy'\n.*p\.jsonl:1"),
        ('{"id": "a", "prompt": "x", "style": ["messy"]}', "one of clean, messy"),
        ('{"id": "a", "prompt": "x", "domain": ""}', "the field 'domain'"),
        ('{"id": "a", "prompt": "x", "domain": null}', "the field 'domain'"),
        ('{"id": "a", "prompt": "x", "pair": 4}', "the field 'pair'"),
        ('\n{"id": "a", "prompt": "x", "pair": "p"}', r"one clean and one messy prompt, it is: clean\n.*p\.jsonl:2"),
        (
            '{"id": "a", "prompt": "x", "pair": "p"}\n{"id": "b", "prompt": "x", "pair": "p"}',
            r"it is: clean, clean\n.*p\.jsonl:2",
        ),
        (
            '{"id": "a", "prompt": "x", "pair": "p", "domain": "x"}\n'
            '{"id": "b", "prompt": "x", "pair": "p", "domain": "y", "style": "messy"}',
            r"of the domains x and y\n.*p\.jsonl:2",
        ),
        ("", "no prompts"),
    ],
)
def test_a_faulty_prompt_is_told_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_prompts(path)


ROWS = st.tuples(st.text(st.characters(codec="utf-8")), st.sampled_from(["clean", "messy"]), st.booleans())


@given(st.lists(ROWS, min_size=1))
def test_whatever_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    prompts = tuple(
        Prompt(str(number), ({"role": "user", "content": text},) if turns else text, "d", style)
        for number, (text, style, turns) in enumerate(rows)
    )
    lines = [
        {"id": each.id, "domain": each.domain, "style": each.style}
        | ({"prompt": each.prompt} if isinstance(each.prompt, str) else {"messages": list(each.prompt)})
        for each in prompts
    ]
    path = written(tmp_path_factory.mktemp("prompts") / "p.jsonl", *lines)
    assert read_prompts(path).prompts == prompts


def test_the_digest_is_that_of_the_content_and_not_of_the_file(tmp_path: Path) -> None:
    rows = {"id": "a", "prompt": "x", "domain": "d"}, {"id": "b", "messages": list(TURNS), "domain": "d"}
    first = read_prompts(written(tmp_path / "one.jsonl", *rows))
    second = read_prompts(written(tmp_path / "two.jsonl", *({"more": 1, "style": "clean", **row} for row in rows)))
    assert first.sha256 == second.sha256
    assert first.sha256 != PromptSet(first.prompts[::-1], "one.jsonl").sha256


@pytest.mark.parametrize(
    "change",
    [
        {"id": "z"},
        {"prompt": "y"},
        {"prompt": ({"role": "user", "content": "x"},)},
        {"domain": "e"},
        {"style": "messy"},
        {"pair": "p"},
    ],
    ids=lambda change: "-".join(change),
)
def test_each_field_enters_the_digest(change: dict[str, Any]) -> None:
    prompt = Prompt("a", "x", "d")
    assert PromptSet((prompt,), "").sha256 != PromptSet((replace(prompt, **change),), "").sha256


def test_a_conversation_is_seen_through_the_template_and_ends_where_the_answer_begins() -> None:
    tokenizer = factories.tokenizer()
    expected = (
        "<|start|>user\nHow high is it?<|end|>\n<|start|>assistant\nNine metres.<|end|>\n"
        "<|start|>user\nAnd wide?<|end|>\n<|start|>assistant\n"
    )
    assert encode_prompt(tokenizer, Prompt("a", TURNS)) == tokenizer(expected)["input_ids"]
    assert Prompt("a", TURNS).shown == "user: How high is it?\nassistant: Nine metres.\nuser: And wide?"


def test_an_empty_prompt_is_an_empty_message_with_a_template() -> None:
    tokenizer = factories.tokenizer()
    expected = tokenizer("<|start|>user\n<|end|>\n<|start|>assistant\n")["input_ids"]
    assert encode_prompt(tokenizer, Prompt("a", "")) == expected


def test_an_empty_prompt_without_a_template_is_the_token_that_stands_before_a_text() -> None:
    tokenizer = plain_tokenizer()
    assert encode_prompt(tokenizer, Prompt("a", "")) == [0]  # the end of the text before
    tokenizer.bos_token = "<|start|>"
    assert encode_prompt(tokenizer, Prompt("a", "")) == [1]
    assert encode_prompt(tokenizer, Prompt("a", "x")) == tokenizer("x")["input_ids"]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="an empty prompt needs a token to begin with"):
        encode_prompt(tokenizer, Prompt("a", ""))


def test_a_token_that_the_tokenizer_adds_itself_is_not_added_again() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.bos_token = "<|start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    assert encode_prompt(tokenizer, Prompt("a", "")) == [1]


def test_what_the_model_cannot_continue_is_skipped_and_named() -> None:
    prompts = PromptSet((Prompt("a", "x"), Prompt("b", TURNS), Prompt("c", "")), "p.jsonl")
    tokenizer = plain_tokenizer()
    encoded = encode_prompts(prompts, tokenizer)
    assert encoded.prompt_set is prompts
    assert [prompt.id for prompt in encoded.prompts] == ["a", "c"]
    assert list(encoded.input_ids) == [tokenizer("x")["input_ids"], [0]]
    assert encoded.skipped == {"b": "a conversation needs a chat template, and the tokenizer has none"}
    assert encode_prompts(prompts, factories.tokenizer()).skipped == {}


def test_a_template_that_refuses_some_conversations_refuses_those() -> None:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('one turn') if messages | length > 1 else messages[0].content }}"
    encoded = encode_prompts(PromptSet((Prompt("a", "x"), Prompt("b", TURNS)), "p.jsonl"), tokenizer)
    assert [prompt.id for prompt in encoded.prompts] == ["a"]
    assert "one turn" in encoded.skipped["b"]


def test_a_set_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(InputError, match=r"none of the prompts\n.*b: a conversation needs"):
        encode_prompts(PromptSet((Prompt("b", TURNS),), "p.jsonl"), plain_tokenizer())


def test_prompts_beyond_the_learned_positions_are_listed() -> None:
    prompts = PromptSet((Prompt("long", "The miller " * 40), Prompt("b", "x"), Prompt("turns", TURNS)), "p.jsonl")
    encoded = encode_prompts(prompts, plain_tokenizer())
    longest = len(encoded.input_ids[0])
    refuse_long(encoded, None, 8)
    refuse_long(encoded, longest + 8, 8)
    with pytest.raises(InputError, match=rf"(?s)8 new tokens.*long: {longest} tokens(?!.*b:)"):
        refuse_long(encoded, longest + 7, 8)
