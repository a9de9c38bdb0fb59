"""A tokenizer's files as a whole: every fault in the artifact's files is named with file, key and both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import factories
from qexport.errors import InputError
from qexport.export.tgi.families import tgi_tokenizer_files
from qexport.loading.small_files import has_tokenizer, read_sidecars, tokenizer_from_files
from qexport.text.preflight import TokenizerFolder
from qexport.text.tokenizer_files import compare_tokenizer_files

Files = dict[str, bytes]
Fault = Callable[[Files], object]

CONFIG = {"model_type": "llama", "eos_token_id": 0}
TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<|end|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tokenizer")
    factories.tokenizer().save_pretrained(folder)
    return dict(read_sidecars(folder))


def opened(files: Files) -> TokenizerFolder:
    tokenizer = tokenizer_from_files(files, CONFIG, name="tiny") if has_tokenizer(files) else None
    return TokenizerFolder(tokenizer, files, CONFIG)


def failed(base: Files, artifact: Files) -> dict[str, str]:
    checks = compare_tokenizer_files(opened(base), opened(artifact))
    assert {check.gate for check in checks} <= {"files"}
    return {check.name: check.detail for check in checks if not check.passed}


def edited(name: str, edit: Callable[[Any], object]) -> Fault:
    def fault(files: Files) -> None:
        content = json.loads(files.get(name, b"{}"))
        edit(content)
        files[name] = json.dumps(content).encode()

    return fault


def sections(**changes: Any) -> Fault:
    return edited("tokenizer.json", lambda content: content.update(changes))


def keys(**changes: Any) -> Fault:
    return edited("tokenizer_config.json", lambda content: content.update(changes))


def file(name: str, content: bytes) -> Fault:
    return lambda files: files.update({name: content})


def two_ids(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "truncation": (
        sections(truncation=TRUNCATION), "tokenizer.json",
        "truncation is {'direction': 'Right', 'max_length': 16, 'strategy': 'LongestFirst', 'stride': 0}, not missing",
    ),
    "padding": (sections(padding=PADDING), "tokenizer.json", "padding is {'strategy': {'Fixed': 8}"),
    "a normalizer": (sections(normalizer={"type": "NFC"}), "tokenizer.json", "normalizer is {'type': 'NFC'}, not"),
    "another pre-tokenizer": (
        edited("tokenizer.json", lambda content: content["pre_tokenizer"].update(use_regex=False)),
        "tokenizer.json", "pre_tokenizer.use_regex is False, not True",
    ),
    "no decoder": (sections(decoder=None), "tokenizer.json", "decoder is missing, not {'type': 'ByteLevel'"),
    "another post-processor": (
        edited("tokenizer.json", lambda content: content["post_processor"]["pair"].reverse()),
        "tokenizer.json", "post_processor.pair[0].Sequence.id is 'B', not 'A'",
    ),
    "a rule of an added token": (
        edited("tokenizer.json", lambda content: content["added_tokens"][1].update(rstrip=True)),
        "tokenizer.json", "added_tokens[1].rstrip is True, not False",
    ),
    "one merge missing": (
        edited("tokenizer.json", lambda content: content["model"]["merges"].pop()),
        "tokenizer.json", "entries, not ",
    ),
    "dropout": (
        edited("tokenizer.json", lambda content: content["model"].update(dropout=0.5)),
        "tokenizer.json", "model.dropout is 0.5, not missing",
    ),
    "two ids": (edited("tokenizer.json", two_ids), "tokenizer.json", "model.vocab.a is "),
    "a short model_max_length": (
        keys(model_max_length=16), "tokenizer_config.json",
        "model_max_length is 16, not 1000000000000000019884624838656",
    ),
    "add_bos_token": (keys(add_bos_token=True), "tokenizer_config.json", "add_bos_token is True, not missing"),
    "another truncation side": (keys(truncation_side="left"), "tokenizer_config.json", "truncation_side is 'left'"),
    "another padding token": (keys(pad_token="<|start|>"), "tokenizer_config.json", "pad_token is '<|start|>', not"),
    "another class": (keys(tokenizer_class="GPT2Tokenizer"), "tokenizer_config.json", "tokenizer_class is 'GPT2"),
    "spaces cleaned up": (keys(clean_up_tokenization_spaces=True), "tokenizer_config.json", "clean_up_tokenization"),
    "a special token": (
        file("special_tokens_map.json", b'{"pad_token": {"content": "<|start|>"}}'),
        "special_tokens_map.json", "pad_token is '<|start|>', not '<|end|>'",
    ),
    "an added token": (file("added_tokens.json", b'{"<|new|>": 384}'), "added_tokens.json", "<|new|> is 384, not miss"),
    "a vocabulary": (file("vocab.json", b'{"a": 1}'), "vocab.json", "not "),
    "merges": (file("merges.txt", b"#version: 0.2\na b\n"), "merges.txt", "merge [0] is 'a b', not '"),
    "a model of sentencepiece": (file("tokenizer.model", b"x"), "tokenizer.model", "only the artifact has it"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_file_key_and_values(saved: Files, name: str) -> None:
    fault, file_name, told = FAULTS[name]
    files = dict(saved)
    fault(files)
    found = failed(saved, files)
    assert found.keys() == {file_name}
    assert told in found[file_name]


def test_what_says_the_same_in_another_form_passes(saved: Files) -> None:
    model = json.loads(saved["tokenizer.json"])["model"]
    vocabulary = json.dumps(model["vocab"]).encode()
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]).encode()
    forms: list[Fault] = [
        file("tokenizer.json", json.dumps(json.loads(saved["tokenizer.json"]), indent=1).encode()),
        edited("tokenizer.json", lambda found: found["model"].update(merges=[" ".join(m) for m in model["merges"]])),
        keys(eos_token={"__type": "AddedToken", "content": "<|end|>", "lstrip": False}, tokenizer_file="/x/y"),
        keys(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False),
        file("special_tokens_map.json", b'{"pad_token": "<|end|>", "eos_token": {"content": "<|end|>"}}'),
        file("vocab.json", vocabulary),
        file("merges.txt", merges),
        file("added_tokens.json", b'{"<|start|>": 1}'),
        lambda files: files.pop("tokenizer_config.json") and keys(eos_token="<|end|>", pad_token="<|end|>")(files),
    ]  # fmt: skip
    for form in forms:
        files = dict(saved)
        form(files)
        assert failed(saved, files) == {}


def test_a_server_layouts_files_and_those_that_transformers_saves_again_pass(saved: Files, tmp_path: Path) -> None:
    extra = dict(saved)
    keys(extra_special_tokens=["<|start|>"])(extra)
    for base in (saved, extra):
        assert failed(base, tgi_tokenizer_files(base)) == {}
        tokenizer_from_files(base, CONFIG, name="tiny").save_pretrained(tmp_path)
        assert failed(base, dict(read_sidecars(tmp_path))) == {}


def test_where_a_tokenizer_is_missing_another_gate_says_so(saved: Files) -> None:
    assert compare_tokenizer_files(opened({}), opened({})) == []
    assert compare_tokenizer_files(opened(saved), opened({})) == []


def test_a_file_that_tokenizers_cannot_read_is_an_input_error(saved: Files) -> None:
    base, broken = opened(saved), {**saved, "tokenizer.json": b'{"version": "1.0"}'}
    with pytest.raises(InputError, match=r"tokenizers cannot read it.*\n.*tokenizer\.json"):
        compare_tokenizer_files(base, TokenizerFolder(base.tokenizer, broken, CONFIG))


@settings(max_examples=25)
@given(st.data())
def test_any_other_value_of_a_key_that_both_have_is_named(saved: Files, data: st.DataObject) -> None:
    base = opened(saved)
    content = json.loads(saved["tokenizer_config.json"])
    key = data.draw(st.sampled_from(sorted(content.keys() - {"backend", "tokenizer_class"})))
    value = data.draw(st.one_of(st.integers(), st.text(), st.booleans()).filter(lambda value: value != content[key]))
    files = {**saved, "tokenizer_config.json": json.dumps({**content, key: value}).encode()}
    [config] = [
        check
        for check in compare_tokenizer_files(base, TokenizerFolder(base.tokenizer, files, CONFIG))
        if check.name == "tokenizer_config.json"
    ]
    assert not config.passed
    assert config.detail.startswith(f"{key} is ")
