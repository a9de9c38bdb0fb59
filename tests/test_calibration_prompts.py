"""The prompts that a release is judged by are well formed, varied, and apart from every text that models see."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import factories
from qexport.text.prompts import Prompt, encode_prompts, read_prompts
from test_calibration_text import DOMAINS, SCRIPTS, passages, unprintable, word_sequences

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "calibration"
PATH = FOLDER / "prompts" / "release.jsonl"
PROMPTS = read_prompts(PATH).prompts
SETS = {path.name: read_prompts(path).prompts for path in (PATH, FOLDER / "prompts" / "heldout.jsonl")}
SUBJECTS = {"release-notes", "medical", "legal", "news", "code", "creative", "french", "general"}
LONG = 1000
"""Characters; 300 tokens have more."""


def text(prompt: Prompt) -> str:
    """What a person would read, without the roles."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return "\n".join(message["content"] for message in prompt.prompt)


def request(prompt: Prompt) -> str:
    """What both forms of one request share."""
    return prompt.pair or prompt.id


def unseen(character: str) -> bool:
    """Characters that an editor does not show: controls, formats, other spaces, marks on the letter before."""
    marks = "\u0300" <= character <= "\u036f" or character in "\u0489\ufe0f"
    return marks or (character != " " and unicodedata.category(character) in {"Cc", "Cf", "Zs", "Zl", "Zp"})


def kinds(prompts: Iterable[Prompt]) -> list[int]:
    listed = list(prompts)
    return [
        len(listed),
        sum(prompt.style == "messy" for prompt in listed),
        sum(not isinstance(prompt.prompt, str) for prompt in listed),
        sum(isinstance(prompt.prompt, str) and len(prompt.prompt) >= LONG for prompt in listed),
    ]


@pytest.mark.parametrize("name", SETS)
def test_every_line_has_all_fields_and_the_ids_are_sorted(name: str) -> None:
    rows = [json.loads(line) for line in (PATH.parent / name).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert set(row) in ({"id", "domain", "style", "pair", part} for part in ("prompt", "messages"))
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", row["id"])
    ids = [row["id"] for row in rows]
    assert ids == sorted(ids)


def test_there_are_enough_prompts_of_each_kind() -> None:
    assert len(PROMPTS) >= 120
    pairs = Counter(prompt.domain for prompt in PROMPTS if prompt.style == "messy")
    assert set(pairs) == SUBJECTS
    assert pairs.total() >= 40
    assert min(pairs.values()) >= 5
    _, _, turns, long = kinds(PROMPTS)
    assert turns >= 8
    assert long >= 4
    short = [text(prompt) for prompt in PROMPTS if prompt.domain == "short"]
    assert max(len(prompt.split()) for prompt in short) <= 2
    assert short.count("") == 1
    assert sum(bool(prompt) and not prompt.strip() for prompt in short) >= 1
    assert sum(bool(prompt.strip()) for prompt in short) >= 6
    assert sum(prompt.domain == "unicode" for prompt in PROMPTS) >= 8


def test_each_domain_of_the_held_out_text_has_prompts_of_both_styles() -> None:
    prompts = SETS["heldout.jsonl"]
    domains = DOMAINS | {"maths", "technical"} | set(SCRIPTS)
    for messy, least in ((False, 5), (True, 2)):
        counts = Counter(prompt.domain for prompt in prompts if (prompt.style == "messy") == messy)
        assert set(counts) == domains
        assert min(counts.values()) >= least
    assert len(prompts) >= 120


@pytest.mark.parametrize("name", SETS)
def test_a_pairs_prompts_carry_its_name(name: str) -> None:
    for prompt in SETS[name]:
        if prompt.pair is not None:
            assert (prompt.id, prompt.pair.rpartition("-")[0]) == (f"{prompt.pair}-{prompt.style}", prompt.domain)


@pytest.mark.parametrize("name", SETS)
def test_conversations_alternate_and_need_no_system_message(name: str) -> None:
    for prompt in SETS[name]:
        if not isinstance(prompt.prompt, str):
            roles = [message["role"] for message in prompt.prompt]
            assert len(roles) >= 3
            assert roles == [("user", "assistant")[index % 2] for index in range(len(roles))]


@pytest.mark.parametrize(
    ("sought", "of"),
    [
        ("combining marks", lambda c: unicodedata.combining(c) > 0),
        ("right to left", lambda c: unicodedata.bidirectional(c) in {"R", "AL"}),
        ("an override", lambda c: c == "\N{RIGHT-TO-LEFT OVERRIDE}"),
        ("joined emoji", lambda c: c == "\N{ZERO WIDTH JOINER}"),
        ("CJK", lambda c: "CJK UNIFIED" in unicodedata.name(c, "")),
        ("no width", lambda c: c == "\N{ZERO WIDTH SPACE}"),
        ("letters of mathematics", lambda c: unicodedata.name(c, "").startswith("MATHEMATICAL")),
        ("a no-break space", lambda c: c == "\N{NO-BREAK SPACE}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_unusual_characters_are_there(sought: str, of: object) -> None:
    assert callable(of)
    assert any(of(c) for prompt in PROMPTS if prompt.domain == "unicode" for c in text(prompt)), sought


@pytest.mark.parametrize("name", SETS)
def test_what_an_editor_does_not_show_is_written_as_escapes(name: str) -> None:
    lines = (PATH.parent / name).read_text(encoding="utf-8").split("\n")
    assert {c for line in lines for c in line if unseen(c)} == set()


@pytest.mark.parametrize("name", SETS)
def test_there_are_no_control_characters(name: str) -> None:
    assert {prompt.id: unprintable(text(prompt)) for prompt in SETS[name] if unprintable(text(prompt))} == {}


def test_no_request_comes_twice() -> None:
    prompts = [(name, prompt) for name, found in SETS.items() for prompt in found]
    assert [content for content, count in Counter(text(prompt) for _, prompt in prompts).items() if count > 1] == []
    owners: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, prompt in prompts:
        for sequence in word_sequences(text(prompt)):
            assert owners.setdefault(sequence, (name, request(prompt))) == (name, request(prompt))


@pytest.mark.parametrize(
    "path",
    [
        FOLDER / "general.jsonl",
        FOLDER / "heldout.jsonl",
        FOLDER / "heldout-languages.jsonl",
        FOLDER / "prompts" / "demo.jsonl",
        ROOT / "recipes" / "adapters" / "smollm2-release-notes" / "train.jsonl",
    ],
    ids=lambda path: path.name,
)
def test_no_prompt_shares_twelve_words_with(path: Path) -> None:
    seen = set().union(
        *(word_sequences(row[field]) for row in passages(path) for field in row.keys() - {"id", "domain"})
    )
    assert seen
    prompts = [prompt for found in SETS.values() for prompt in found]
    assert [prompt.id for prompt in prompts if word_sequences(text(prompt)) & seen] == []


@pytest.mark.parametrize("name", SETS)
def test_the_readme_counts_what_is_there(name: str) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8").partition(f"## What is in `prompts/{name}`\n")[2]
    readme = readme.partition("\n## ")[0]
    rows = re.findall(r"^\| \**([\w-]+)\** \|((?: \**\d+\** \|){4})$", readme, re.M)
    told = {domain: [int(count) for count in re.findall(r"\d+", counts)] for domain, counts in rows}
    domains = {prompt.domain for prompt in SETS[name]}
    found = {domain: kinds(prompt for prompt in SETS[name] if prompt.domain == domain) for domain in domains}
    assert told == {**found, "all": kinds(SETS[name])}


@pytest.mark.parametrize("name", SETS)
def test_models_with_and_without_a_chat_template_take_the_set(name: str) -> None:
    prompts, tokenizer = read_prompts(PATH.parent / name), factories.tokenizer()
    assert encode_prompts(prompts, tokenizer).skipped == {}
    tokenizer.chat_template = None
    assert set(encode_prompts(prompts, tokenizer).skipped) == {
        prompt.id for prompt in SETS[name] if not isinstance(prompt.prompt, str)
    }
