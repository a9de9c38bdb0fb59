"""The form of answers: JSON under a schema, tool calls, Python code; and the files that ask for it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import answering_models
import factories
from qexport.errors import InputError
from qexport.text.extraction import first_json, python_problem
from qexport.text.formats import PythonCode, ToolCall, read_format_prompts
from qexport.text.json_schema import JsonSchema
from qexport.text.prompts import Prompt, PromptSet, encode_prompt, encode_prompts

ROOT = Path(__file__).parent.parent
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES) | st.lists(VALUES)


@given(OBJECTS, st.integers(0, 4), st.sampled_from(["", "Here you are: ", "Sure!\n\n"]))
def test_json_is_found_alone_between_words_and_in_a_fence(value: Any, indent: int, before: str) -> None:
    text = json.dumps(value, indent=indent)
    assert first_json(text) == value
    assert first_json(f"{before}{text} and that is all.") == value
    assert first_json(f"{before}\n```json\n{text}\n```\nMore words {{}}.") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no complete JSON value"),
        ("I cannot do that.", "no complete JSON value"),
        ('{"a": 1', "no complete JSON value"),
        ('{"a": NaN}', "no complete JSON value"),
        ("```json\n{'a': 1}\n```", "the fenced block is no JSON"),
        ('```json\n{"a": 1', "the fenced block is no JSON"),
        ("[" * 100_000, "no complete JSON value"),
        ('{"a":' * 50_000, "no complete JSON value"),
    ],
)
def test_what_is_no_json_is_told(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        first_json(text)


@given(VALUES)
def test_a_schema_accepts_what_jsonschema_accepts(value: Any) -> None:
    schema = {"type": ["object", "array"], "maxItems": 2, "maxProperties": 1}
    accepted = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert (JsonSchema(schema, "here").problem(json.dumps(value)) is None) == accepted


def test_a_schema_tells_where_the_answer_breaks_it() -> None:
    schema = {"properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert JsonSchema(schema, "here").problem('{"n": "three"}') == "n: 'three' is not of type 'integer'"
    assert JsonSchema(schema, "here").problem("{}") == "'n' is a required property"


CALLS = ToolCall([answering_models.TOOL], "here")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "go", "arguments": {"to": "x"}}',
        '<tool_call>\n{"name": "go", "arguments": {"to": "x"}}\n</tool_call>',  # Qwen, Hermes
        '{"name": "go", "parameters": {"to": "x"}}',  # Llama 3
        '[TOOL_CALLS] [{"name": "go", "arguments": {"to": "x"}}]',  # Mistral, its token shown
        '{"type": "function", "function": {"name": "go", "arguments": "{\\"to\\": \\"x\\"}"}}',  # OpenAI
    ],
)
def test_calls_of_usual_templates_are_valid(text: str) -> None:
    assert CALLS.problem(text) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("I go.", "no complete JSON"),
        ('{"name": "stop", "arguments": {}}', "no tool of the name 'stop'"),
        ('{"name": "go", "arguments": {}}', "'to' is a required property"),
        ('{"name": "go", "arguments": {"to": 3}}', "to: 3 is not of type"),
        ('{"name": "go", "arguments": "to x"}', "the arguments are no JSON"),
        ("[]", "empty"),
        ("[3]", "must be a JSON object"),
        ('{"arguments": {"to": "x"}}', "no tool of the name None"),
    ],
)
def test_what_is_no_call_is_told(text: str, problem: str) -> None:
    assert problem in str(CALLS.problem(text))


@pytest.mark.parametrize("path", sorted((ROOT / "qexport/text").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_real_code_parses_and_a_cut_of_it_as_ast_has_it(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert python_problem(code) is None
    assert python_problem(f"Here:\n```python\n{code}\n```\nDone.") is None
    for cut in (code[: len(code) // 2], code[:-20]):
        try:
            ast.parse(cut.strip())
        except SyntaxError:
            assert python_problem(cut) is not None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Sure", "no code"),
        ("", "no code"),
        ("```python\n```", "no code"),
        ("def f(:\n    pass", "line 1"),
        ("The function returns a + b.", "line 1"),
        ("x = '\0'", "cannot be parsed|null"),
        ("(" * 60_000, "too many nested"),
        ("x = " + "-" * 60_000 + "1", "cannot be parsed: nested too deeply"),
        ("x = 1" + "+1" * 30_000, "cannot be parsed"),
    ],
)
def test_what_is_no_code_is_told(text: str, problem: str) -> None:
    assert re.search(problem, str(PythonCode().problem(text)))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (None, "'format' must be an object"),
        ({"json_schema": {}, "code": "python"}, "with one key"),
        ({"code": "cobol"}, "unknown format"),
        ({"json_schema": {"type": "objekt"}}, "the JSON Schema is malformed"),
        ({"json_schema": {"$ref": "https://example.org/a.json"}}, "nothing is fetched"),
        ({"tools": []}, "list of tools"),
        ({"tools": [{"name": "go"}]}, "a tool has no name"),
        ({"tools": [answering_models.TOOL, answering_models.TOOL]}, "listed twice"),
    ],
)
def test_a_malformed_format_is_told_with_its_line(tmp_path: Path, stated: Any, message: str) -> None:
    path = tmp_path / "formats.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "x", "format": stated}) + "\n")
    with pytest.raises(InputError, match=rf"{message}[\s\S]*formats\.jsonl:1"):
        read_format_prompts(path)


@pytest.mark.parametrize("schema", [{"$ref": "#/$defs/none"}, {"$ref": "#"}], ids=["nowhere", "circle"])
def test_a_reference_that_leads_nowhere_is_an_error(schema: Any) -> None:
    with pytest.raises(InputError, match="cannot be applied"):
        JsonSchema(schema, "here").problem("{}")


def test_tools_are_in_the_prompt_or_it_is_skipped() -> None:
    prompt, tokenizer = Prompt("t1", "go x"), answering_models.tokenizer()
    text = str(tokenizer.decode(encode_prompt(tokenizer, prompt, [answering_models.TOOL])))
    assert text.startswith("<|start|>tools\ngo ")
    encoded = encode_prompts(
        PromptSet((prompt, Prompt("p", "x")), "f"), factories.tokenizer(), {"t1": [answering_models.TOOL]}
    )
    assert encoded.skipped == {"t1": "the chat template does not name the tools"}


def test_the_digest_covers_prompts_and_formats(tmp_path: Path) -> None:
    digests = set()
    for prompt, form in (("x", {"code": "python"}), ("y", {"code": "python"}), ("x", {"json_schema": {}})):
        path = tmp_path / "f.jsonl"
        path.write_text(json.dumps({"id": "a", "prompt": prompt, "format": form}))
        digests.add(read_format_prompts(path).sha256)
    assert len(digests) == 3


def test_the_shipped_prompts_are_of_every_kind() -> None:
    found = read_format_prompts(ROOT / "calibration/prompts/formats.jsonl")
    kinds = [prompt.domain for prompt in found.prompt_set.prompts]
    assert {kind: kinds.count(kind) for kind in kinds} == {"code": 14, "json": 16, "tools": 10}
