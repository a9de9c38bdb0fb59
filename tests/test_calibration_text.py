"""The calibration and held-out texts are well formed, varied, and apart from each other."""

import json
import re
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "calibration"
FILES = sorted(FOLDER.glob("*.jsonl"))
DOMAINS = {"prose", "news", "medical", "legal", "code", "dialogue", "tables", "french"}
OVERLAP_WORDS = 12


def passages(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def unprintable(text: str) -> set[str]:
    """Control, surrogate, private and unassigned characters, and the mark of a failed decoding."""
    suspects = {
        c for c in text if unicodedata.category(c) in {"Cc", "Cs", "Co", "Cn"} or c == "\N{REPLACEMENT CHARACTER}"
    }
    return suspects - {"\n", "\t"}


def word_sequences(text: str, length: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def repeated(values: list[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_a_passage_with_an_id_a_domain_and_a_text(path: Path) -> None:
    for passage in passages(path):
        assert set(passage) == {"id", "domain", "text"}
        assert all(isinstance(value, str) and value.strip() for value in passage.values())
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-\d{3}", passage["id"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ids_are_sorted(path: Path) -> None:
    ids = [passage["id"] for passage in passages(path)]
    assert all(earlier < later for earlier, later in pairwise(ids))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_text_holds_no_control_characters(path: Path) -> None:
    assert {p["id"]: unprintable(p["text"]) for p in passages(path) if unprintable(p["text"])} == {}


@pytest.mark.parametrize("character", ["\0", "\r", "\x1b", "\x85", "\ue000", "\N{REPLACEMENT CHARACTER}"])
def test_a_control_character_would_be_seen(character: str) -> None:
    assert unprintable(f"a line\n\tand {character} another") == {character}


def test_ids_and_texts_are_unique_across_the_files() -> None:
    everything = [passage for path in FILES for passage in passages(path)]
    assert repeated([passage["id"] for passage in everything]) == []
    assert repeated([passage["text"] for passage in everything]) == []


def test_the_general_set_covers_the_eight_domains() -> None:
    counts = Counter(passage["domain"] for passage in passages(FOLDER / "general.jsonl"))
    assert set(counts) == DOMAINS
    assert min(counts.values()) >= 20
    assert counts.total() >= 200


def test_an_id_of_the_general_set_begins_with_its_domain() -> None:
    for passage in passages(FOLDER / "general.jsonl"):
        assert passage["id"].rpartition("-")[0] == passage["domain"]


def test_passages_of_the_general_set_do_not_repeat_each_other() -> None:
    owners: dict[tuple[str, ...], str] = {}
    for passage in passages(FOLDER / "general.jsonl"):
        for sequence in word_sequences(passage["text"]):
            assert owners.setdefault(sequence, passage["id"]) == passage["id"]


def test_no_held_out_text_is_in_the_general_set() -> None:
    seen = set().union(*(word_sequences(passage["text"]) for passage in passages(FOLDER / "general.jsonl")))
    held_out = passages(FOLDER / "heldout.jsonl")
    assert held_out
    assert [p["id"] for p in held_out if word_sequences(p["text"]) & seen] == []


def test_a_shared_sequence_is_seen_through_case_and_punctuation() -> None:
    first = "Before: one two three four five six seven eight nine ten eleven twelve."
    second = "ONE, two; three four -- five six seven eight nine ten eleven Twelve! After."
    assert word_sequences(first) & word_sequences(second)
    assert not word_sequences(first) & word_sequences(second.replace("six", "sixty"))
