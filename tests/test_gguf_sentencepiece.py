"""Tokenizers of SentencePiece's kind in the layout gguf: scores that give the same tokens, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import factories
import gguf_folders
import qexport
import sentencepiece_tokenizers as tiny
from gguf_faults import copied, value_of
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.names import GGUF_NAME
from qexport.errors import CompatibilityError
from qexport.export.gguf.files import GgufFiles
from qexport.export.gguf.sentencepiece_keys import SCORES, TOKEN_TYPES, TOKENS, same_vocabulary
from qexport.export.gguf.tokenizer_keys import GgufTokenizer, gguf_tokenizer
from qexport.formats.gguf.sentencepiece import SPACE
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.text.torture import TORTURE

STYLES = {"llama 2": tiny.LLAMA2, "gemma": tiny.GEMMA, "phi 3": tiny.PHI3}
ALL = {**STYLES, "spaced": tiny.SPACED}
TEXTS = [*factories.TEXT, *(text for text in TORTURE.values() if 0 < len(text) < 300)]
Change = Callable[[dict[str, Any]], None]


@cache
def stored(name: str) -> str:
    return json.dumps(tiny.tiny(ALL[name]))


def content(name: str, change: Change = lambda _: None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stored(name))
    change(found)
    return found


def converted(
    found: Mapping[str, Any], *, rows: int | None = None, inexact: bool = False, **more: Any
) -> GgufTokenizer:
    begin, end = (token["content"] for token in found["added_tokens"][1:3])
    settings = {"bos_token": begin, "eos_token": end, **more}
    files = {"tokenizer.json": json.dumps(found).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return gguf_tokenizer(files, {}, rows or len(found["model"]["vocab"]), inexact=inexact)


@pytest.mark.parametrize("name", STYLES)
def test_scores_give_the_tokens_that_merges_give(name: str) -> None:
    found = content(name)
    values, fast = converted(found).values, tiny.fast(found)
    added = [token["content"] for token in found["added_tokens"] if SPACE not in token["content"]]
    texts = [text for text in TEXTS if not any(token in text for token in added)]
    assert len(texts) > 20
    for text in texts:
        assert tiny.joined_by_scores(text, values) == fast(text, add_special_tokens=False)["input_ids"], text


def test_what_the_header_says_of_llama_2s_tokenizer() -> None:
    found = content("llama 2")
    values = converted(found, rows=len(found["model"]["vocab"]) + 2).values
    plain = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items() if not isinstance(value, list)}
    assert plain == {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "add_bos_token": True, "add_eos_token": False, "add_space_prefix": True,
    }  # fmt: skip
    tokens, scores, kinds = (values[key] for key in (TOKENS, SCORES, TOKEN_TYPES))
    assert tokens == [*found["model"]["vocab"], "[PAD503]", "[PAD504]"]
    joined = len(dict.fromkeys("".join(pair) for pair in found["model"]["merges"]))
    rest = len(found["model"]["vocab"]) - 3 - 256
    assert kinds == [3] * 3 + [6] * 256 + [1] * rest + [5] * 2
    assert scores == [-1000.0] * 3 + [0.0] * 256 + [-float(place) for place in range(rest)] + [-10000.0] * 2
    assert joined < rest  # what is left are single characters


def test_added_tokens_with_signs_for_spaces_are_joined_as_others() -> None:
    """llama.cpp would look for the sign in the text; tokenizers joins spaces to such tokens."""
    made = converted(content("spaced"), inexact=True)
    values = made.values
    tokens, kinds, scores = values[TOKENS], values[TOKEN_TYPES], values[SCORES]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert isinstance(scores, list)
    assert [kinds[tokens.index(text)] for text in ("\n\n", "<table>", SPACE * 2, "<bos>")] == [4, 4, 1, 3]
    assert [scores[tokens.index(text)] for text in (SPACE * 2, SPACE * 3, "\n\n")] == [0.0, -1.0, -1000.0]
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert f"has the sign {SPACE} itself" in made.notes[0]
    with pytest.raises(CompatibilityError, match="inexact: allow takes that"):
        converted(content("spaced"))
    fast = tiny.fast(content("spaced"))
    for text, same in (("a  b   c", True), (f"a {SPACE * 2} b", False)):
        assert (tiny.joined_by_scores(text, values) == fast(text, add_special_tokens=False)["input_ids"]) is same


def metaspace(scheme: str, **more: Any) -> Change:
    def change(found: dict[str, Any]) -> None:
        step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False, **more}
        found.update(normalizer=None, pre_tokenizer=step)

    return change


def missing_pair(found: dict[str, Any]) -> None:
    merges = found["model"]["merges"]
    text = next("".join(pair) for pair in merges if len("".join(pair)) > 3)
    found["model"]["merges"] = [pair for pair in merges if "".join(pair) != text or pair == merges[0]]


def split_pairs(found: dict[str, Any]) -> None:
    merges = found["model"]["merges"]
    texts = ["".join(pair) for pair in merges]
    first = next(place for place, text in enumerate(texts) if texts.count(text) > 1)
    merges.append(merges.pop(first))


def without_byte(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<0x41>")


def without_letter(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    vocabulary["ab\u00fe"] = len(vocabulary)


def add(text: str, **more: Any) -> Change:
    def change(found: dict[str, Any]) -> None:
        vocabulary = found["model"]["vocab"]
        number = vocabulary.setdefault(text, len(vocabulary))
        found["added_tokens"].append({**found["added_tokens"][0], "id": number, "content": text, **more})

    return change


REFUSED: Mapping[str, tuple[Change, str]] = {
    "a pair is missing": (missing_pair, "make a token, and are not in the list"),
    "pairs apart": (split_pairs, "are not one behind the other"),
    "a byte is missing": (without_byte, "no token <0x41>"),
    "a letter is missing": (without_letter, "has a character that is no token"),
    "another normalizer": (lambda c: c.update(normalizer={"type": "NFKC"}), "not those of SentencePiece's BPE"),
    "another decoder": (lambda c: c.update(decoder={"type": "Fuse"}), "not those of SentencePiece's BPE"),
    "spaces only where there are none": (metaspace("first"), "inexact: allow takes that"),
    "the same for each piece": (metaspace("always"), "inexact: allow takes that"),
    "words apart": (metaspace("first", split=True), "not those of SentencePiece's BPE"),
    "unigram": (lambda c: c["model"].update(type="Unigram"), "Unigram, and not BPE"),
    "merges are ignored": (lambda c: c["model"].update(ignore_merges=True), "dropout or ignore_merges"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "dropout or ignore_merges"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "a prefix or suffix"),
    "white space is dropped": (lambda c: c["added_tokens"][0].update(rstrip=True), "rstrip, and not of all tokens"),
    "white space before": (lambda c: c["added_tokens"][0].update(lstrip=True), "has lstrip"),
    "found after normalizing": (lambda c: c["added_tokens"][0].update(normalized=True), "is normalized"),
    "an added token with a space": (add(f"a{SPACE}q", special=False), "no merges make it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_llama_cpp_would_not_match_is_refused(case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(CompatibilityError, match=words) as caught:
        converted(content("llama 2", change))
    assert "leave the layout gguf out" in str(caught.value)


def test_what_is_refused_gives_other_tokens_by_scores() -> None:
    """The two conditions on the list of merges are not stricter than what they are for."""
    sound = converted(content("llama 2")).values
    words = [each for text in factories.TEXT for each in text.split()]
    found = content("llama 2", missing_pair)
    fast = tiny.fast(found)
    assert any(
        tiny.joined_by_scores(word, sound) != fast(word, add_special_tokens=False)["input_ids"] for word in words
    )


def test_a_space_only_where_there_is_none_is_taken_on_request() -> None:
    found = content("llama 2", metaspace("first"))
    made = converted(found, inexact=True)
    assert made.values["tokenizer.ggml.add_space_prefix"] is True
    assert "only where there is none" in made.notes[0]
    fast = tiny.fast(found)
    for text, same in (("a word", True), (" a word", False)):
        assert (tiny.joined_by_scores(text, made.values) == fast(text, add_special_tokens=False)["input_ids"]) is same


def test_metaspace_without_a_prefix_is_taken() -> None:
    found = content("gemma", metaspace("never"))
    made, fast = converted(found), tiny.fast(found)
    for text in (" a word", "The miller", "x  y"):
        assert tiny.joined_by_scores(text, made.values) == fast(text, add_special_tokens=False)["input_ids"]


def test_the_class_that_transformers_reads_in_another_way_is_named() -> None:
    """Tokens of a text that begins with a space show it."""
    notes = converted(content("llama 2"), tokenizer_class="LlamaTokenizerFast").notes
    assert "class LlamaTokenizer" in notes[0]
    assert converted(content("gemma"), tokenizer_class="GemmaTokenizer").notes == ()


@pytest.mark.parametrize(
    ("style", "name", "wanted"),
    [
        ("phi 3", "mini", "mini (Phi-3)"),
        ("phi 3", "Phi-3-mini", "Phi-3-mini"),
        ("llama 2", "my-Phi3-copy", "my-Phi 3-copy"),
        ("llama 2", "PHI-3", "Phi 3"),
        ("gemma", "other", "other"),
    ],
)
def test_the_name_says_whether_llama_cpp_drops_white_space(style: str, name: str, wanted: str) -> None:
    assert converted(content(style)).model_name(name) == wanted


# Files of other programs.


def official(values: Mapping[str, Any]) -> dict[str, Any]:
    """As llama.cpp's converter writes Gemma: added tokens have spaces, and a score and a type of their own."""
    tokens, scores, kinds = (list(values[key]) for key in (TOKENS, SCORES, TOKEN_TYPES))
    for text in (SPACE * 2, SPACE * 3):
        place = tokens.index(text)
        tokens[place], scores[place], kinds[place] = text.replace(SPACE, " "), -1000.0, 4
    return {TOKENS: tokens, SCORES: [score * 1.5 for score in scores], TOKEN_TYPES: kinds}


def test_a_vocabulary_of_others_may_be_written_in_another_way() -> None:
    values = converted(content("spaced"), inexact=True).values
    other = official(values)
    assert same_vocabulary(other, values) == other
    tokens = [*other[TOKENS][:-1], "else"]
    assert set(same_vocabulary({**other, TOKENS: tokens}, values)) == {TOKEN_TYPES}
    swapped = list(other[SCORES])
    places = [other[TOKENS].index(text) for text in (SPACE + "t", "he") if text in other[TOKENS]]
    swapped[places[0]], swapped[places[1]] = swapped[places[1]], swapped[places[0]]
    assert set(same_vocabulary({**other, SCORES: swapped}, values)) == {TOKEN_TYPES, TOKENS}


# Whole folders.


def with_tokenizer(family: str, style: str, folder: Path) -> Checkpoint:
    """A tiny model of a family with a tokenizer of a style."""
    found = content(style)
    config = gguf_folders.CONFIGS[family]
    values = {**config.to_dict(), "vocab_size": len(found["model"]["vocab"]) + 3, "bos_token_id": 1, "eos_token_id": 2}
    factories.build(type(config)(**values)).save_pretrained(folder)
    tiny.fast(found).save_pretrained(folder)
    return gguf_folders.load(folder)


FOLDERS = {"mistral": "llama 2", "gemma 3": "gemma", "phi 3": "phi 3"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        place = tmp_path_factory.mktemp("made")
        base = with_tokenizer(family, FOLDERS[family], place / "base")
        records = list(gguf_folders.records(base, gguf_folders.NONE, place))
        gguf_folders.write(gguf_folders.layout("gguf", base, gguf_folders.NONE), place / "gguf", records, base)
        return place

    return make


@pytest.mark.parametrize("family", FOLDERS)
def test_transformers_makes_the_same_tokens_of_the_file(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family) / "gguf"
    own = open_tokenizer(load_checkpoint(LoadSettings(base=str(folder / GGUF_NAME))))
    oracle = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    original = open_tokenizer(gguf_folders.load(made(family) / "base"))
    for text in TEXTS:
        assert own(text)["input_ids"] == oracle(text)["input_ids"] == original(text)["input_ids"], text


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.write_text(tmp_path_factory.mktemp("text") / "held.jsonl", passages=12, seed=3)


@pytest.mark.parametrize("family", FOLDERS)
def test_a_sound_folder_passes_and_a_changed_score_does_not(
    family: str, made: Callable[[str], Path], held_out: Path, tmp_path: Path
) -> None:
    def change(path: Path) -> None:
        value_of(path, SCORES, np.float32(-1).tobytes(), np.float32(-2).tobytes())

    settings = qexport.VerifySettings(text=str(held_out), windows=4, max_windows=4, sequence_length=12, profile="off")
    for folder, failed in (
        (made(family) / "gguf", []),
        (copied(made(family) / "gguf", tmp_path / "changed", change), ["tokenizer"]),
    ):
        report = qexport.verify(folder, qexport.LoadSettings(base=str(made(family) / "base")), settings)
        assert [check.gate for check in report.checks if not check.passed] == failed


def test_the_name_of_a_phi_3_is_in_the_file(tmp_path: Path) -> None:
    base = with_tokenizer("phi 3", "phi 3", tmp_path / "base")
    layout = gguf_folders.layout("gguf", replace(base, origin=replace(base.origin, name="mini")), gguf_folders.NONE)
    assert isinstance(layout.weights, GgufFiles)
    assert layout.weights.values["general.name"] == "mini (Phi-3)"
