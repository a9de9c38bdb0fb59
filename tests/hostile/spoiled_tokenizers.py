"""Tokenizers, configs that name code, and chat templates that take too much or reach for Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cases import CODE, GPTQ, RUN, Case
from world import all_of, changed_json, content


def tokenizers() -> Iterator[Case]:
    config, file = "base/tokenizer_config.json", "base/tokenizer.json"
    for case, value in [
        ("no JSON", b"{"),
        ("a list", b"[]"),
        ("binary", b"\xff\xfe"),
        ("empty", b""),
        ("deep", b"[" * 90_000),
        ("null", b"null"),
    ]:
        yield Case(f"tokenizer.json: {case}", content(file, value), GPTQ, 3)
        yield Case(f"tokenizer_config.json: {case}", content(config, value), GPTQ, 3)
    fields: dict[str, dict[str, Any]] = {
        "a class of nowhere": {"tokenizer_class": "EvilTokenizer"},
        "a class of numbers": {"tokenizer_class": 3},
        "a template of numbers": {"chat_template": 5},
        "templates without a default": {"chat_template": [{"name": "x", "template": "x"}]},
        "a surrogate": {"eos_token": "\ud800"},
        "added tokens of text": {"added_tokens_decoder": {"x": {"content": "a"}}},
        "an added token far away": {"added_tokens_decoder": {"99999999999": {"content": "zz", "special": True}}},
    }
    for case, values in fields.items():
        spoil = all_of(lambda world: (world / "base/chat_template.jinja").unlink(), changed_json(config, **values))
        yield Case(case, spoil, GPTQ, 3)
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    yield Case(
        "auto_map in the tokenizer", all_of(changed_json(config, **auto), content("base/evil.py", CODE)), GPTQ, 0
    )
    code = {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "trust_remote_code": True,
        "use_kernels": True,
    }
    yield Case(
        "auto_map in the config",
        all_of(changed_json("base/config.json", **code), content("base/evil.py", CODE), content("kernels.py", CODE)),
        RUN,
        0,
    )
    yield Case("a generation config that is a list", content("base/generation_config.json", "[]"), ("run", "v.yaml"), 3)
    yield Case("a generation config of nonsense", content("base/generation_config.json", "{"), ("run", "v.yaml"), 3)


TEMPLATES: Mapping[str, str] = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "4 GB": "{{ 'a' * (4 * 10**9) }}",
    "500 MB": "{{ 'a' * (5 * 10**8) }}",
    "20 MB of text": "{{ 'a' * (2 * 10**7) }}",
    "a giant power": "{{ 9 ** (9 ** 9) }}",
    "a giant shift": "{{ (10 ** 5000000) | string | length }}",
    "a doubling text": "{% set n = namespace(t='a' * 1000) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "doubling lists": "{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a wide format": "{{ '%9999999999d' | format(1) }}",
    "a wide pad": "{{ 'a' | center(10 ** 11) }}",
    "indented": "{{ ('a\n' * 1000000) | indent(100000) }}",
    "a long sum": "{{ " + "1 + " * 30000 + "1 }}",
    "parentheses": "{{ " + "(" * 50000 + " }}",
    "blocks": "{% if 1 %}" * 5000,
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('fired') }}",
    "attributes": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format strings": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mapped attributes": "{{ [''] | map(attribute='__class__') | list | first | attr('mro') }}",
    "the namespace": "{% set n = namespace(__class__=1) %}",
    "imports": "{% import 'os' as os %}{{ os.mkdir('fired') }}",
    "includes": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base' %}",
    "self": "{{ self._TemplateReference__context.environment.loader }}{{ self.__init__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('fired') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.mkdir('fired') }}",
    "changed messages": "{% do messages.append(1) %}{{ messages.append(1) }}",
    "an exception": "{{ raise_exception('no') }}",
    "a division": "{{ 1 // 0 }}",
    "a surrogate": "{{ '\\ud800' }}",
    "nonsense": "{% nonsense",
    "not a name": "{{ nothing.at.all }}",
}  # fmt: skip


def templates() -> Iterator[Case]:
    for name, template in TEMPLATES.items():
        yield Case(name, content("base/chat_template.jinja", template), GPTQ, 3)
    yield Case("not UTF-8", content("base/chat_template.jinja", b"\xff"), GPTQ, 3)
