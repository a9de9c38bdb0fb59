"""Refusals in the words of many models and languages, answers that only look like them, and files of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import InputError
from qexport.text.refusals import BEGINNING, PHRASES, read_requests, refusal

ROOT = Path(__file__).parent.parent

REFUSED = {
    "english": [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "Sorry, I cannot do this.",
        "I cannot and will not provide instructions for that.",
        "As an AI language model, I cannot do that.",
        "I am unable to help with entering somebody's home.",
        "I won't help you with this.",
        "I must decline this request.",
        "Thanks for asking. However, I'm not able to write such a message.",
    ],
    "german": [
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Tut mir wirklich leid, das mache ich nicht.",
        "Ich kann dir dabei nicht helfen.",
        "Dabei darf ich dir leider nicht behilflich sein; darf ich nicht.",
    ],
    "french": ["Je suis désolé, mais je ne peux pas vous aider.", "Je ne peux pas répondre à cette demande."],
    "spanish": ["Lo siento, pero no puedo ayudarte con eso.", "No puedo ayudar con eso."],
    "italian": ["Mi dispiace, ma non posso aiutarti.", "Non posso fornire istruzioni."],
    "portuguese": ["Desculpe, mas não posso ajudar com isso.", "Não posso ajudar com isso."],
    "dutch": ["Het spijt me, maar ik kan je daar niet bij helpen.", "Ik kan je hier niet mee helpen."],
    "polish": ["Przepraszam, ale nie mogę w tym pomóc."],
    "russian": ["Извините, но я не могу с этим помочь.", "К сожалению, я не могу помочь."],
    "chinese": ["抱歉，我不能提供帮助。", "对不起，我无法回答这个问题。"],
    "japanese": ["申し訳ありませんが、お手伝いできません。"],
    "korean": ["죄송하지만 도와드릴 수 없습니다."],
    "arabic": ["عذرًا، لا أستطيع المساعدة في ذلك."],
    "hindi": ["क्षमा करें, मैं इसमें मदद नहीं कर सकता।"],
}

ANSWERED = [
    "",
    "Sure! First, take the pin.",
    "I'm sorry to hear that you have a cold. Drink tea.",
    "I can't wait to see what you make of it! Start with the roof.",
    "You can do it in three steps.",
    "Cut the roots first. " * 12 + "I cannot stress enough that you need gloves, and I'm sorry, but that is it.",
    "Natürlich. Schneide die Rosen im Herbst.",
    "Die Rosen solltest du nicht im Sommer schneiden.",
    "Bien sûr. Épluchez l'ail avec un couteau.",
    "No hay problema: puedes hacerlo en tres pasos.",
    "Конечно. Сначала возьмите нож.",
    "当然可以。首先，准备一把刀。",
    "もちろんです。まず、玉ねぎを切ります。",
]


@pytest.mark.parametrize("language", PHRASES)
def test_refusals_are_found_in_each_language(language: str) -> None:
    assert [text for text in REFUSED[language] if refusal(text) is None] == []


@pytest.mark.parametrize("text", ANSWERED)
def test_answers_are_none(text: str) -> None:
    assert refusal(text) is None


@given(st.text(st.characters(codec="utf-8")))
def test_only_the_beginning_counts(rest: str) -> None:
    assert (
        refusal("A quiet morning at the harbour. " * (BEGINNING // 30 + 1) + rest + " I'm sorry, but I cannot.") is None
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the kind must be harmful or harmless, not None"),
        ({"kind": "bad"}, "not 'bad'"),
        ({"kind": []}, r"not \[\]"),
    ],
)
def test_a_malformed_request_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "x", **row}) + "\n")
    with pytest.raises(InputError, match=rf"{message}[\s\S]*requests\.jsonl:1"):
        read_requests(path)


def test_the_shipped_requests_are_forty_of_each_kind() -> None:
    found = read_requests(ROOT / "calibration/prompts/refusals.jsonl").prompt_set.prompts
    kinds = [prompt.domain for prompt in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {"harmful": 40, "harmless": 40}
    assert len({prompt.shown for prompt in found}) == 80
