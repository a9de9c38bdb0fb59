"""Chat templates as a text before a message and one after it, held against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import factories
from qexport.errors import InputError
from qexport.export.onnx.chat import ChatTurn, chat_turn

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATES = {
    "as it is": PLAIN + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "stripped": "{{ bos_token }}" + PLAIN.replace("m.content", "m.content | trim"),
    "a system prompt, quotes and emoji": "<|system|>Say \"'\\\n😀{{ '</' }}" + PLAIN,
    "nothing before": "{{ messages[0].content }}",
}


def files_of(template: str, folder: Path) -> tuple[PreTrainedTokenizerFast, dict[str, bytes]]:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = template, "<|start|>"
    tokenizer.save_pretrained(folder)
    return tokenizer, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("message", ["Why?", "  two\nlines <{}> \n"])
def test_the_texts_around_a_message_are_those_of_transformers(message: str, template: str, tmp_path: Path) -> None:
    tokenizer, files = files_of(template, tmp_path)
    turn = chat_turn(files)
    assert turn is not None
    conversation = [{"role": "user", "content": message}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert turn.before + (message.strip() if turn.stripped else message) + turn.after == expected


def test_a_template_inside_tokenizer_config_and_tokens_as_objects() -> None:
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    assert chat_turn(files) == ChatTurn(before="<s>", after="", stripped=False)


def test_without_a_template_there_is_nothing_around() -> None:
    assert chat_turn({"tokenizer_config.json": b"{}"}) is None
    assert chat_turn({}) is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ messages[0].content }}", "{{ messages[0].content | upper }}", "nothing",
        "{{ raise_exception('no') }}", "{{ messages[0].content | replace('{', '(') }}", "{{",
        "{{ messages[0].content[:20] }}",
    ],
)  # fmt: skip
def test_templates_that_are_no_two_texts_are_refused(template: str, tmp_path: Path) -> None:
    _, files = files_of(template, tmp_path)
    with pytest.raises(InputError, match="chat template"):
        chat_turn(files)


def test_a_template_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(InputError, match="UTF-8"):
        chat_turn({"chat_template.jinja": b"\xff{{ messages[0].content }}"})
