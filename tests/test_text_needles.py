"""Long texts with one fact inside: their length, their depth, and whether an answer has the fact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import factories
from qexport.text.needles import ANSWER_TOKENS, make_needles, recalls

TOKENIZER = factories.tokenizer()


def test_texts_fill_their_length_and_hold_the_fact_at_its_depth_once() -> None:
    found = make_needles(TOKENIZER, [512, 1024], 4)
    assert found is not None
    places = []
    for prompt, ids in zip(found.encoded.prompts, found.encoded.input_ids, strict=True):
        length, number, text = int(prompt.domain), found.numbers[prompt.id], prompt.shown
        assert length - ANSWER_TOKENS - 100 < len(ids) <= length - ANSWER_TOKENS
        assert text.count(number) == 1
        assert text.rstrip().endswith("Answer with the number alone.")
        places.append(text.index(number) / len(text))
    assert places[:4] == sorted(places[:4])
    assert places[4:] == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.12)
    assert len(set(found.numbers.values())) == 8


def test_the_same_seed_gives_the_same_texts_and_another_one_others() -> None:
    digests = [made.sha256 for seed in (0, 0, 1) if (made := make_needles(TOKENIZER, [512], 2, seed)) is not None]
    assert digests[0] == digests[1] != digests[2]


def test_a_length_without_room_has_no_texts() -> None:
    assert make_needles(TOKENIZER, [64], 2) is None


def test_a_model_without_a_template_continues_the_sentence() -> None:
    plain = factories.tokenizer()
    plain.chat_template = None
    found = make_needles(plain, [512], 1)
    assert found is not None
    assert found.encoded.prompts[0].shown.endswith(" is")


@given(st.integers(10_000, 99_999), st.sampled_from(["{}", "{:,}", "It is {}.", "**{}**", "the number {:,}, I think"]))
def test_a_number_is_recalled_in_any_writing(number: int, form: str) -> None:
    assert recalls(str(number), form.format(number))


@pytest.mark.parametrize("text", ["", "1234", "123456", "112345", "12346", "1 2 3 4 5", "12.345.678"])
def test_other_numbers_are_not(text: str) -> None:
    assert not recalls("12345", text)
