"""The tokenizer's preflight: every check against the fault that it is for, planted in the artifact's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import factories
from qexport.artifact.figures import CheckResult
from qexport.errors import InputError
from qexport.export.tgi.families import tgi_tokenizer_files
from qexport.loading.small_files import has_tokenizer, read_sidecars, tokenizer_from_files
from qexport.text.preflight import CHECKS, TokenizerFolder, preflight, refuse_contradicting_ends
from qexport.text.prompts import Prompt, read_prompts
from qexport.text.tokenizers import template_digest, tokenizer_digest
from qexport.text.torture import TORTURE

Files = dict[str, bytes]
Fault = Callable[[Files, dict[str, Any]], None]

PROMPTS = [
    Prompt("a", "The miller opened the sluice"),
    Prompt("b", ({"role": "user", "content": "Total: 12 boxes"},)),
]
CONFIG = {"model_type": "llama", "eos_token_id": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tokenizer")
    factories.tokenizer().save_pretrained(folder)
    generation = {"generation_config.json": b'{"eos_token_id": [1, 0]}'}
    return {**read_sidecars(folder), **generation}


def opened(files: Files, config: dict[str, Any]) -> TokenizerFolder:
    tokenizer = tokenizer_from_files(files, config, name="tiny") if has_tokenizer(files) else None
    return TokenizerFolder(tokenizer, files, config)


def compared(base: Files, fault: Fault, *, rows: int = factories.VOCABULARY) -> dict[str, CheckResult]:
    files, config = dict(base), dict(CONFIG)
    fault(files, config)
    checks = preflight(opened(base, CONFIG), opened(files, config), prompts=PROMPTS, embedding_rows=rows)
    assert [check.name for check in checks] == list(CHECKS)
    return {check.name: check for check in checks}


def failed(checks: dict[str, CheckResult]) -> set[str]:
    assert all(check.detail for check in checks.values())
    return {name for name, check in checks.items() if check.passed is False}


def edited(name: str, edit: Callable[[Any], None]) -> Fault:
    """Plants a fault in a JSON file."""

    def fault(files: Files, config: dict[str, Any]) -> None:
        content = json.loads(files.get(name, b"{}"))
        edit(content)
        files[name] = json.dumps(content).encode()

    return fault


def tokenizer_json(**changes: Any) -> Fault:
    return edited("tokenizer.json", lambda content: content.update(changes))


def tokenizer_config(**changes: Any) -> Fault:
    return edited("tokenizer_config.json", lambda content: content.update(changes))


def generation_config(ends: Any) -> Fault:
    return edited("generation_config.json", lambda content: content.update(eos_token_id=ends))


def config_end(ends: Any) -> Fault:
    return lambda files, config: config.update(eos_token_id=ends)


def content(name: str, change: Callable[[bytes], bytes]) -> Fault:
    return lambda files, config: files.update({name: change(files.get(name, b""))})


def added(number: int, **rules: Any) -> Fault:
    token = dict(id=number, content="<|new|>", single_word=False, lstrip=False, rstrip=False, normalized=False)
    return edited("tokenizer.json", lambda content: content["added_tokens"].append({**token, "special": True, **rules}))


def rule(**rules: Any) -> Fault:
    """Changes how `<|start|>` is found in text."""
    return edited("tokenizer.json", lambda content: content["added_tokens"][1].update(rules))


def swap_ids(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]


def swap_merges(content: Any) -> None:
    merges = content["model"]["merges"]
    merges.insert(0, merges.pop(next(index for index, pair in enumerate(merges) if pair[0] == "Ġ" and index)))
    merges[:] = merges[::-1]


def nothing(files: Files, config: dict[str, Any]) -> None:
    """Leaves the files as they are."""


FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "another padding token": (tokenizer_config(pad_token="<|start|>"), {"special_tokens"}),
    "one special token more": (tokenizer_config(extra_special_tokens=["<|start|>"]), {"special_tokens"}),
    "another end": (tokenizer_config(eos_token="<|start|>"), {"special_tokens", "end_token"}),
    "the end in generation_config.json": (generation_config(1), {"end_token"}),
    "one end less in generation_config.json": (generation_config([0]), {"end_token"}),
    "no generation_config.json": (lambda files, config: files.__delitem__("generation_config.json"), {"end_token"}),
    "the end in config.json": (config_end(2), {"end_token"}),
    "the other padding side": (tokenizer_config(padding_side="left"), {"padding_side"}),
    "one byte of the template": (
        content("chat_template.jinja", lambda text: text.replace(b"role }}\n", b"role }} ")),
        {"chat_template"},
    ),
    "a white space that Jinja drops": (content("chat_template.jinja", lambda text: text + b"\n"), {"chat_template"}),
    "another line end": (
        content("chat_template.jinja", lambda text: text.replace(b"\n", b"\r\n")),
        {"chat_template"},
    ),
    "no template": (lambda files, config: files.__delitem__("chat_template.jinja"), {"chat_template"}),
    "a second place for the template": (tokenizer_config(chat_template="{{ messages }}"), {"chat_template"}),
    "a further template": (content("additional_chat_templates/tool.jinja", lambda text: b"x"), {"chat_template"}),
    "a token beyond the embedding": (added(384), {"vocabulary", "embedding", "special_tokens"}),
    "an ordinary token beyond the embedding": (
        added(384, special=False),
        {"vocabulary", "embedding", "special_tokens"},
    ),
    "other merges": (edited("tokenizer.json", swap_merges), {"token_ids"}),
    "two ids": (edited("tokenizer.json", swap_ids), {"vocabulary", "token_ids"}),
    "a normalizer": (tokenizer_json(normalizer={"type": "NFC"}), {"token_ids", "decoding"}),
    "a normalizer of case": (tokenizer_json(normalizer={"type": "Lowercase"}), {"token_ids", "decoding"}),
    "a space before each text": (
        edited("tokenizer.json", lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
        {"token_ids", "decoding"},
    ),
    "another splitting": (
        edited("tokenizer.json", lambda content: content["pre_tokenizer"].update(use_regex=False)),
        {"token_ids"},
    ),
    "a token before each text": (
        edited(
            "tokenizer.json",
            lambda content: content["post_processor"].update(
                single=[{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                special_tokens={"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
            ),
        ),
        {"token_ids", "decoding"},
    ),
    "no decoder": (tokenizer_json(decoder=None), {"decoding"}),
    "a token that eats the space after it": (rule(rstrip=True), {"special_tokens", "token_ids", "decoding"}),
    "a token that is special no longer": (rule(special=False), {"special_tokens", "decoding"}),
    "special tokens that are split": (
        tokenizer_config(split_special_tokens=True),
        {"end_token", "token_ids", "decoding"},
    ),
}


def test_the_same_files_pass_every_check(saved: Files) -> None:
    checks = compared(saved, nothing)
    assert {name: check.passed for name, check in checks.items()} == dict.fromkeys(CHECKS, True)
    texts = 2 * len(PROMPTS) + len(TORTURE) + 2
    assert checks["token_ids"].detail == f"{texts} texts are equal"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_the_checks_that_are_for_it(saved: Files, name: str) -> None:
    fault, expected = FAULTS[name]
    assert failed(compared(saved, fault)) == expected


def test_each_check_is_failed_by_some_fault() -> None:
    assert set().union(*(expected for _, expected in FAULTS.values())) == set(CHECKS)


@pytest.mark.parametrize(
    ("fault", "check", "told"),
    [
        ("another padding token", "special_tokens", "pad_token: '<|end|>', now '<|start|>'"),
        ("another end", "end_token", "the tokenizer's end-of-text token is 0, now 1"),
        ("the end in generation_config.json", "end_token", "generation_config.json ends with [0, 1], now [1]"),
        ("the end in config.json", "end_token", "config.json ends with [0], now [2]"),
        ("special tokens that are split", "end_token", "'<|end|>' is 0, but encodes to ["),
        ("the other padding side", "padding_side", "right, now left"),
        ("one byte of the template", "chat_template", "chat_template.jinja, default: the bytes differ from byte 56"),
        ("a second place for the template", "chat_template", "tokenizer_config.json, default: the bytes differ"),
        ("a further template", "chat_template", "chat_template.jinja, tool: only the artifact has it"),
        ("no template", "chat_template", "the artifact has none, the base has one"),
        ("a token beyond the embedding", "embedding", "the embedding has 384 rows; '<|new|>' is 384"),
        ("a token beyond the embedding", "vocabulary", "384 tokens, 385 in the artifact; '<|new|>' is None, now 384"),
        ("other merges", "token_ids", "the prompt a: token "),
        ("a normalizer", "token_ids", "the text 'decomposed': token "),
        ("a token before each text", "token_ids", "the text 'empty': token 0 is [], now [0]"),
    ],
)
def test_the_detail_says_what_differs(saved: Files, fault: str, check: str, told: str) -> None:
    assert told in compared(saved, FAULTS[fault][0])[check].detail


def test_a_token_beyond_the_embedding_in_the_base_too_is_told_and_passes(saved: Files) -> None:
    checks = compared(saved, nothing, rows=383)
    assert failed(checks) == set()
    assert checks["embedding"].detail.startswith("beyond the 383 rows of the embedding, as in the base: ")


def test_a_base_that_contradicts_itself_is_refused(saved: Files) -> None:
    refuse_contradicting_ends(opened(saved, CONFIG))
    wrong = {**saved, "generation_config.json": b'{"eos_token_id": 1}'}
    with pytest.raises(InputError, match=r"0 ends a text for the tokenizer, generation_config.json ends with \[1\]"):
        refuse_contradicting_ends(opened(wrong, CONFIG))
    refuse_contradicting_ends(opened({}, CONFIG))


def test_an_end_that_the_files_deny_fails_although_the_base_has_it_too(saved: Files) -> None:
    base = {**saved, "generation_config.json": b'{"eos_token_id": 1}'}
    checks = compared(base, nothing)
    assert failed(checks) == {"end_token"}
    assert checks["end_token"].detail == "0 ends a text for the tokenizer, generation_config.json ends with [1]"


def test_where_generation_config_names_no_end_that_of_config_json_counts(saved: Files) -> None:
    base = {**saved, "generation_config.json": b"{}"}
    assert compared(base, nothing)["end_token"].detail == "'<|end|>' is 0, as in config.json"
    sides = [opened(base, {"model_type": "llama", "eos_token_id": 2}) for _ in range(2)]
    ends = {check.name: check for check in preflight(*sides, prompts=[], embedding_rows=384)}["end_token"]
    assert ends.passed is False


def test_what_cannot_be_measured_is_no_pass(saved: Files) -> None:
    bare: Files = {}
    checks = preflight(opened(bare, CONFIG), opened(bare, CONFIG), prompts=PROMPTS, embedding_rows=384)
    assert [(check.name, check.passed) for check in checks] == [(name, None) for name in CHECKS]
    checks = preflight(opened(saved, CONFIG), opened(bare, CONFIG), prompts=PROMPTS, embedding_rows=384)
    assert [(check.name, check.passed) for check in checks] == [(name, False) for name in CHECKS]
    endless = dict(saved)
    edited("tokenizer_config.json", lambda content: content.pop("eos_token"))(endless, {})
    found = compared(endless, nothing)
    assert {name for name, check in found.items() if check.passed is None} == {"end_token"}


def test_a_malformed_file_is_an_input_error(saved: Files) -> None:
    with pytest.raises(InputError, match=r"JSON object\n.*generation_config\.json"):
        compared(saved, content("generation_config.json", lambda _: b"[]"))


def test_a_server_layouts_files_are_the_same_tokenizer(saved: Files) -> None:
    named = {**saved, "additional_chat_templates/tool.jinja": b"{{ messages }} tool"}
    for base in (saved, named):
        checks = compared(base, lambda files, config: files.update(tgi_tokenizer_files(files)))
        assert failed(checks) == set()
        assert checks["chat_template"].detail == "equal in chat_template.jinja, tokenizer_config.json"


def test_the_committed_prompts_pass(saved: Files) -> None:
    prompts = read_prompts(Path(__file__).parents[1] / "calibration" / "prompts" / "release.jsonl").prompts
    sides = opened(saved, CONFIG), opened(saved, CONFIG)
    assert all(check.passed for check in preflight(*sides, prompts=prompts, embedding_rows=384))


def test_an_artifacts_folder_executes_nothing(saved: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    evil = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Config"}}
    files = dict(saved)
    tokenizer_config(**evil)(files, {})
    tokenizer = tokenizer_from_files({**files, "evil.py": b"raise SystemExit"}, {**CONFIG, **evil}, name="tiny")
    assert tokenizer("wheel")["input_ids"] == factories.tokenizer()("wheel")["input_ids"]


def test_the_torture_texts_are_distinct_and_can_be_written() -> None:
    assert len(set(TORTURE.values())) == len(TORTURE) >= 40
    assert all(text.encode("utf-8").decode("utf-8") == text for text in TORTURE.values())


def test_the_tokenizers_digest_changes_with_the_tokenizer_alone(saved: Files) -> None:
    digest = tokenizer_digest(saved)
    others = [fault for name, (fault, checks) in FAULTS.items() if checks <= {"chat_template"} or "generation" in name]
    for fault, same in [*((fault, True) for fault in others), (tokenizer_config(pad_token="<|start|>"), False)]:
        files = dict(saved)
        fault(files, {})
        assert (tokenizer_digest(files) == digest) is same
    files = dict(saved)
    edited("tokenizer.json", swap_merges)(files, {})
    assert tokenizer_digest(files) != digest
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_digest({"generation_config.json": b"{}"})


def test_the_templates_digest_is_that_of_its_bytes(saved: Files) -> None:
    tokenizer = opened(saved, CONFIG).tokenizer
    assert tokenizer is not None
    first = template_digest(tokenizer)
    assert first == sha256(saved["chat_template.jinja"]).hexdigest()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool": "x"}
    several = template_digest(tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template["default"], "tool": "y"}
    assert len({first, several, template_digest(tokenizer)}) == 3
    tokenizer.chat_template = None
    assert template_digest(tokenizer) is None
