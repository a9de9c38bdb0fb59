"""A model's own continuations, found block by block from guesses: for a model that does not fit in memory as a whole.

One forward over a prompt and a guess of what follows gives the model's choice at every position. Up to and including
the first choice that differs from the guess, the choices are those that the model makes one after the other; what
follows is guessed again. Guesses come from a smaller model that fits in memory (speculative decoding, Leviathan et al.
2023), or are the choices of the pass before (Jacobi decoding, Santilli et al. 2023). They decide how many passes it
takes, never the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from qexport.architectures.runner import BlockRunner
from qexport.progress import Steps
from qexport.verifying.continuation import Continuation, continue_all, ends_of, finite
from qexport.verifying.predictors import TOKENS_AT_ONCE, Head
from qexport.verifying.prompt_batches import PromptBatch, batch_prompts

_BATCH_TOKENS: Final = 1024
"""Tokens that go through a block at a time. A batch runs until all of its texts have ended, so it has few texts."""

_PASS_TOKENS: Final = 1 << 16
"""Tokens of a pass, whose hidden states are in memory: 600 MB for Falcon-7B. More texts take further passes, which read
the blocks again; that is less than writing the hidden states to disk after each block."""


@dataclass
class Text:
    """A continuation on its way.

    Attributes:
        prompt: the index of its prompt.
        sample: which sample of the prompt's it is; None for the likeliest tokens.
        input_ids: the prompt's tokens.
        guess: as many tokens as may follow; those at the beginning are `tokens`.
        tokens: the model's own, as far as they are known.
        margins: of `tokens`, see `Continuation`.
        along: the model's choices along the first guess; empty before the first pass.
        ended: whether `tokens` is complete.
    """

    prompt: int
    sample: int | None
    input_ids: Sequence[int]
    guess: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    along: Sequence[int] = ()
    ended: bool = False

    @property
    def continuation(self) -> Continuation:
        """The finished text."""
        assert self.ended
        return Continuation(tuple(self.tokens), tuple(self.margins))

    def guess_next(self, tokens: Sequence[int]) -> None:
        """Replaces the guess behind `tokens`, as far as these go."""
        guess = [*self.tokens, *tokens]
        self.guess = [*guess, *self.guess[len(guess) :]][: len(self.guess)]

    def accept(self, choices: Sequence[int], margins: Sequence[float], ends: set[int]) -> None:
        """Takes the choices up to the first that differs from the guess or is an end; the others are the next guess.

        Args:
            choices: the model's, at each position behind `tokens`, predicted from `guess`.
            margins: of the same positions.
            ends: the tokens that end a text.
        """
        begin, self.along = len(self.tokens), self.along or choices
        for choice, margin, guessed in zip(choices, margins, self.guess[begin:], strict=True):
            self.tokens.append(choice)
            self.margins.append(margin)
            if choice in ends or choice != guessed:
                break
        self.ended = self.tokens[-1] in ends or len(self.tokens) == len(self.guess)
        self.guess_next(choices[len(self.tokens) - begin :])


TextNoise = Callable[[Sequence[Text]], LogitsProcessorList]
"""From texts of one `sample` to the processors that change their logits from each text's next token on."""

Draft = Callable[[Sequence[Text]], None]
"""Gives texts that have not ended a better guess."""


def keep_guesses(_: Sequence[Text]) -> None:
    """A `Draft` for Jacobi decoding: the guess is what the pass before left."""


def decode(
    runner: BlockRunner,
    texts: Sequence[Text],
    settings: GenerationConfig,
    noise: TextNoise,
    draft: Draft,
    steps: Steps,
    name: str,
) -> int:
    """Completes the texts with the memory of one block, and returns how many passes over the blocks it took.

    The batches and their shapes depend on the prompts alone: not on the guesses, nor on which texts have ended. So two
    equal models give equal texts, whatever was guessed. (In mixtures, the shape of an expert's product depends on the
    other tokens of a batch: there, rounding may decide between tokens that are nearly equally likely.)

    Args:
        runner: the model.
        texts: with their first guesses.
        settings: from `greedy_settings`.
        noise: for sampled texts.
        draft: is called after each pass.
        steps: counts the blocks.
        name: the model's, for `steps`.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    passes = 0
    for batches in _portions(texts):
        while waiting := [batch for batch in batches if not all(text.ended for text in batch)]:
            passes += 1
            _run_pass(runner, waiting, ends_of(settings), noise, steps, f"prompts through the {name}, pass {passes}")
            draft([text for batch in waiting for text in batch if not text.ended])
    return passes


def _portions(texts: Sequence[Text]) -> Iterator[list[list[Text]]]:
    """Batches of texts, sorted by length, in lists that share their passes."""
    batches: list[list[Text]] = []
    for text in sorted(texts, key=_length):
        if not batches or (len(batches[-1]) + 1) * _length(text) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    portion: list[list[Text]] = []
    for batch in batches:
        if portion and _tokens([*portion, batch]) > _PASS_TOKENS:
            yield portion
            portion = []
        portion.append(batch)
    yield portion


def _tokens(batches: Sequence[Sequence[Text]]) -> int:
    return sum(len(batch) * _length(batch[-1]) for batch in batches)


def _length(text: Text) -> int:
    """Tokens that go through the model: nothing after the last one is predicted."""
    return len(text.input_ids) + len(text.guess) - 1


@torch.no_grad()
def _run_pass(
    runner: BlockRunner, batches: Sequence[Sequence[Text]], ends: set[int], noise: TextNoise, steps: Steps, name: str
) -> None:
    blocks = len(runner.structure.blocks)
    steps.expect(blocks)
    states, tokens = runner.embed_batches(map(_inputs, batches)), _tokens(batches)
    for index in range(blocks):
        with runner.block(index) as block:
            for state in states:
                runner.forward(index, block, state)
        steps.finished_block(name, index + 1, blocks, tokens)
    with runner.head() as head:
        for batch, state in zip(batches, states, strict=True):
            for text, hidden in zip(batch, state.hidden, strict=True):
                if not text.ended:
                    text.accept(*_choices(text, hidden, head, noise), ends)


def _inputs(batch: Sequence[Text]) -> Tensor:
    """Int64 [texts, tokens]. Shorter ones are filled at the end, which no earlier token sees."""
    longest = _length(batch[-1])
    rows = [[*text.input_ids, *text.guess[:-1]] for text in batch]
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _choices(text: Text, hidden: Tensor, head: Head, noise: TextNoise) -> tuple[list[int], list[float]]:
    """The model's choices, and their margins, behind the text's `tokens`."""
    processors: Any = noise([text])  # transformers gives token ids a type of their own
    choices, margins, none = list[int](), list[float](), torch.empty(1, 0, dtype=torch.int64)
    for logits in islice(_logits(text, hidden, head), len(text.tokens), None):
        first, second = logits[0].topk(2).values.tolist()
        margins.append(first - second)
        choices.append(int(processors(none, logits).argmax()))
    return choices, margins


def _logits(text: Text, hidden: Tensor, head: Head) -> Iterator[Tensor]:
    """float32 [1, vocabulary], position by position from the first new token on."""
    before = len(text.input_ids) - 1
    for states in hidden[before : before + len(text.guess)].split(TOKENS_AT_ONCE):
        yield from finite(head(states)[0]).split(1)


class Drafter:
    """Drafts with a whole model in memory.

    A draft that begins with what has been accepted is used again: the artifact's first draft is most of its own text.

    Args:
        model: with all its weights.
        positions: the most tokens of a text, if the model has learned position embeddings.
        settings: from `greedy_settings`.
        noise: for sampled texts.
    """

    def __init__(
        self, model: PreTrainedModel, positions: int | None, settings: GenerationConfig, noise: TextNoise
    ) -> None:
        self._model, self._positions, self._settings, self._noise = model, positions, settings, noise
        self._drafts: dict[tuple[int, int | None], list[list[int]]] = defaultdict(list)

    def __call__(self, texts: Sequence[Text]) -> None:
        """See `Draft`."""
        unknown = [text for text in texts if not self._remembers(text)]
        for _, group in groupby(sorted(unknown, key=_sample), key=_sample):
            self._draft(list(group))

    def _remembers(self, text: Text) -> bool:
        count = len(text.tokens)
        for draft in self._drafts[text.prompt, text.sample]:
            if len(draft) > count and draft[:count] == text.tokens:
                text.guess_next(draft[count:])
                return True
        return False

    def _draft(self, texts: Sequence[Text]) -> None:
        inputs = [[*text.input_ids, *text.tokens] for text in texts]
        most = max(len(text.guess) for text in texts)
        for batch in batch_prompts(inputs, new_tokens=most, padded=True, fill=0):
            self._draft_batch([texts[index] for index in batch.indices], batch)

    def _draft_batch(self, texts: Sequence[Text], batch: PromptBatch) -> None:
        """Texts that need fewer tokens than others of their batch get too many, which are dropped."""
        own, settings = replace(batch, indices=tuple(range(len(texts)))), deepcopy(self._settings)
        settings.max_new_tokens = max(len(text.guess) - len(text.tokens) for text in texts)
        if self._positions is not None:
            settings.max_new_tokens = min(settings.max_new_tokens, self._positions - batch.input_ids.shape[1])
        found = continue_all(self._model, [own], settings, lambda: None, lambda _: self._noise(texts))
        for text, continuation in zip(texts, found, strict=True):
            self._drafts[text.prompt, text.sample].append([*text.tokens, *continuation.tokens])
            text.guess_next(continuation.tokens)


def _sample(text: Text) -> int:
    return -1 if text.sample is None else text.sample
