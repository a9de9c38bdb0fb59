"""A needle in a haystack: one fact inside a long generated text, and a question about it at the end.

After G. Kamradt, LLMTest_NeedleInAHaystack, 2023. The text is generated from a seed, so that no model has read it, and
its length is that of the model's own tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from transformers import PreTrainedTokenizerBase

from qexport.artifact.digests import sha256_json
from qexport.text.prompts import EncodedPrompts, Prompt, PromptSet, encode_prompt
from qexport.text.tokenizers import tokenize

ANSWER_TOKENS: Final = 24
"""Tokens of an answer, at most."""

_WHO: Final = ("The baker", "A carpenter", "The ferryman", "Our neighbour", "The postwoman", "A gardener", "A teacher",
               "An old sailor", "The librarian", "A young cook", "The miller", "The watchmaker")  # fmt: skip
_DID: Final = ("carried", "painted", "repaired", "sold", "found", "washed", "hid", "measured", "wrapped", "borrowed")
_WHAT: Final = ("a wooden box", "two blue chairs", "the garden gate", "a basket of pears", "an umbrella", "a lamp",
                "the long ladder", "three jars of honey", "a woollen coat", "an empty barrel")  # fmt: skip
_WHERE: Final = ("near the harbour", "behind the school", "at the market", "on the bridge", "under the lime tree",
                 "in the old mill", "beside the station", "in front of the chapel")  # fmt: skip
_WHEN: Final = ("before noon", "after the rain", "on Tuesday", "late in the evening", "in early spring",
                "while the bells rang", "without a word", "for the third time")  # fmt: skip
_TOWNS: Final = ("Norvik", "Almena", "Tarsund", "Brelin", "Ostrava Bay", "Quillon", "Hadley Ford", "Veldam", "Aldmoor",
                 "Castrel")  # fmt: skip


@dataclass(frozen=True)
class Needles:
    """Haystacks with their questions, as the model sees them.

    Attributes:
        encoded: the prompts; their domain is the length in tokens, with room for the answer.
        numbers: the answers, by the prompt's id.
        questions: for display, by the prompt's id.
    """

    encoded: EncodedPrompts
    numbers: Mapping[str, str]
    questions: Mapping[str, str]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the prompts and their answers."""
        return sha256_json([self.encoded.prompt_set.sha256, dict(self.numbers)])


def make_needles(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], count: int, seed: int = 0
) -> Needles | None:
    """Haystacks of some lengths, each with its own fact; the facts of one length are spread evenly over its depth.

    Args:
        tokenizer: the model's.
        lengths: tokens of a prompt and its answer, at most.
        count: haystacks of each length.
        seed: decides texts and facts.

    Returns:
        None if no length has room for a fact and its question.
    """
    found: list[tuple[Prompt, list[int]]] = []
    numbers: dict[str, str] = {}
    questions: dict[str, str] = {}
    for length in lengths:
        for index in range(count):
            needle = _Needle(tokenizer, f"needle-{length}-{index}", (index + 0.5) / count, seed)
            if (made := needle.within(length - ANSWER_TOKENS)) is not None:
                prompt = Prompt(needle.id, made[0], str(length))
                found.append((prompt, made[1]))
                numbers[prompt.id] = needle.number
                questions[prompt.id] = (
                    f"{needle.fact} [at {needle.depth:.0%} of {len(made[1])} tokens] {needle.question}"
                )
    if not found:
        return None
    prompts, ids = zip(*found, strict=True)
    return Needles(EncodedPrompts(PromptSet(prompts, "needles"), prompts, ids, {}), numbers, questions)


def recalls(number: str, text: str) -> bool:
    """Whether an answer has the number, with or without separators of thousands."""
    plain = re.sub(r"(?<=\d)[ ,.'’](?=\d{3}\b)", "", text)
    return re.search(rf"(?<!\d){number}(?!\d)", plain) is not None


class _Needle:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, depth: float, seed: int) -> None:
        self._tokenizer, self.id, self.depth = tokenizer, name, depth
        self._chance = random.Random(f"{seed} {name}")
        town = self._pick(_TOWNS)
        self.number = str(10_000 + int(self._chance.random() * 90_000))
        self.fact = f"The secret number of {town} is {self.number}."
        self.question = f"What is the secret number of {town}? Answer with the number alone."
        self._beginning = f"The secret number of {town} is"

    def within(self, tokens: int) -> tuple[str, list[int]] | None:
        """The longest prompt of at most so many tokens, and its ids; None if not even the fact fits."""
        sentences, left = list[str](), tokens - len(self._encoded([])[1])
        while left > 0:
            sentences.append(self._sentence())
            left -= len(tokenize(self._tokenizer, f" {sentences[-1]}", special_tokens=False))
        while len((made := self._encoded(sentences))[1]) > tokens:
            if not sentences:
                return None
            sentences.pop()
        return made

    def _encoded(self, sentences: Sequence[str]) -> tuple[str, list[int]]:
        place = round(self.depth * len(sentences))
        text = " ".join([*sentences[:place], self.fact, *sentences[place:]])
        text = f"{text}\n\n{self.question}"
        if not self._tokenizer.chat_template:
            text = f"{text}\n\n{self._beginning}"
        return text, encode_prompt(self._tokenizer, Prompt(self.id, text))

    def _sentence(self) -> str:
        return f"{self._pick(_WHO)} {self._pick(_DID)} {self._pick(_WHAT)} {self._pick(_WHERE)} {self._pick(_WHEN)}."

    def _pick(self, words: Sequence[str]) -> str:
        return words[int(self._chance.random() * len(words))]
