"""Distances between texts against sacrebleu, rouge-score and a plain table of edit distances."""

from __future__ import annotations

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from fresh import Fresh
from qexport.verifying.generation import chrf, edit_distance, first_difference, repetition_rate, rouge_l, words

TOKENS = st.lists(st.integers(0, 3), max_size=12)
ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
ENGLISH = (
    "The miller opened the sluice before dawn, and the wheel began to turn.",
    "the Miller opened a sluice at dawn",
)


def distance_by_table(ours: list[int], theirs: list[int]) -> int:
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i in range(len(ours) + 1):
        for j in range(len(theirs) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                changed = table[i - 1][j - 1] + (ours[i - 1] != theirs[j - 1])
                table[i][j] = min(changed, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@given(TOKENS, TOKENS)
def test_the_edit_distance_is_that_of_the_whole_table(ours: list[int], theirs: list[int]) -> None:
    expected = distance_by_table(ours, theirs) / max(len(ours), len(theirs), 1)
    assert edit_distance(ours, theirs) == edit_distance(theirs, ours) == expected


@given(TOKENS, TOKENS)
def test_the_first_difference_is_the_length_of_what_both_share(ours: list[int], theirs: list[int]) -> None:
    found = first_difference(ours, theirs)
    if ours == theirs:
        assert found is None
    else:
        assert found is not None
        assert ours[:found] == theirs[:found]
        assert ours[: found + 1] != theirs[: found + 1]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0), ([1, 1, 1], 0), ([1, 1, 1, 1], 0), ([1] * 5, 1 / 2), ([1, 2, 3, 4] * 3, 5 / 9), ([*range(9)], 0)],
)
def test_repetition_is_the_share_of_fours_that_were_there_before(tokens: list[int], share: float) -> None:
    assert repetition_rate(tokens) == pytest.approx(share)


@given(st.text(max_size=30), st.text(max_size=30))
def test_chrf_is_sacrebleus_unless_both_texts_are_blank(reference: str, text: str) -> None:
    if reference.split() or text.split():
        assert chrf(reference, text) == sacrebleu.sentence_chrf(text, [reference]).score
    else:
        assert chrf(reference, text) == 100


@pytest.mark.parametrize("text", ["a", "midi", "日本", *ENGLISH])
def test_equal_texts_have_the_best_scores_and_an_empty_one_the_worst(text: str) -> None:
    assert chrf(text, text) == pytest.approx(100)
    assert rouge_l(text, text) == 1
    assert (chrf(text, ""), chrf("", text), rouge_l(text, ""), rouge_l("", text)) == (0, 0, 0, 0)


def test_texts_without_words_are_defined() -> None:
    assert (chrf("", ""), chrf(" ", "\n"), rouge_l("", ""), rouge_l("!", "!"), rouge_l("!", "?")) == (100, 100, 1, 1, 0)


@given(ASCII, ASCII)
def test_rouge_l_of_ascii_text_is_that_of_rouge_scores_own_tokenizer(reference: str, text: str) -> None:
    assert words(reference) == tokenize(reference, None)
    if words(reference) or words(text):
        assert rouge_l(reference, text) == RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Le café, déjà fermé !", ["le", "café", "déjà", "fermé"]),
        ("cafe\u0301", ["café"]),
        ("東京は雨です。", list("東京は雨です")),
        ("GPT-4 と 東京", ["gpt", "4", "と", "東", "京"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("snake_case 🙂", ["snake", "case"]),
    ],
)
def test_words_of_other_languages_are_kept(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("reference", "text", "score"), [("thé noir", "thè noir", 1 / 2), ("東京は雨", "東京は雪", 3 / 4)]
)
def test_rouge_l_counts_letters_outside_english(reference: str, text: str, score: float) -> None:
    assert rouge_l(reference, text) == pytest.approx(score)
    assert RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure != pytest.approx(score)


def test_importing_them_waits_until_a_text_is_compared(fresh: Fresh) -> None:
    program = (
        "import sys\n"
        "from qexport.verifying.generation import chrf, rouge_l\n"
        "before = {'nltk', 'sacrebleu', 'rouge_score'} & sys.modules.keys()\n"
        "assert not before, before\n"
        "chrf('a', 'b'), rouge_l('a', 'b')\n"
        "assert {'sacrebleu', 'rouge_score'} <= sys.modules.keys()\n"
    )
    done = fresh.run(program)
    assert done.code == 0, done.err
