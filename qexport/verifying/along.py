"""How far the artifact's predictions are from the reference's along given texts: prompts and what follows them.

Both models run block by block over the same texts, so that nothing but hidden states of one portion is in memory beside
a block, and the two distributions of a token never have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qexport.architectures.runner import Batch, BlockRunner
from qexport.progress import Steps
from qexport.verifying.continuation import finite
from qexport.verifying.continuing import Openable
from qexport.verifying.divergence import TokenFigures, compare_logits
from qexport.verifying.predictors import BATCH_TOKENS, TOKENS_AT_ONCE, Head, shared_heads

PORTION_TOKENS: Final = 1 << 16
"""Tokens whose hidden states are in memory at a time, of both models. More texts read the blocks again."""


@dataclass(frozen=True)
class GivenText:
    """A prompt and what follows it.

    Attributes:
        prompt: its tokens, at least one.
        tokens: what follows, at least one.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]

    @property
    def inputs(self) -> list[int]:
        """The tokens that go through the model: nothing after the last one is predicted."""
        return [*self.prompt, *self.tokens[:-1]]


@torch.no_grad()
def drift_along(
    reference: BlockRunner, artifact: Openable, texts: Sequence[GivenText], steps: Steps, name: str
) -> list[TokenFigures]:
    """The figures of the tokens that follow the prompts, each [1, tokens], in the order of the texts.

    Shorter texts are padded at their end, which no earlier token sees.

    Args:
        reference: the merged model.
        artifact: the artifact; one that has no blocks runs as a whole, text by text.
        texts: along which to predict.
        steps: counts the blocks.
        name: what the texts are, for `steps`.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    found: dict[int, TokenFigures] = {}
    for portion in _portions(texts):
        with _running(reference, artifact, texts, portion, steps, name) as models:
            for index in (index for batch in portion for index in batch):
                found[index] = _compare(texts[index], [model(index) for model in models])
    return [found[index] for index in range(len(texts))]


Logits = Callable[[int], Iterator[Tensor]]
"""From a text's index to its float32 logits [tokens, vocabulary], in pieces of `TOKENS_AT_ONCE` tokens."""


def _compare(text: GivenText, logits: Sequence[Iterator[Tensor]]) -> TokenFigures:
    targets = torch.tensor(text.tokens).split(TOKENS_AT_ONCE)
    parts = [
        compare_logits([finite(piece) for piece in pieces], [(0, 1)], wanted)[0]
        for *pieces, wanted in zip(*logits, targets, strict=True)
    ]
    return TokenFigures.joined(parts).reshape(1)


def _portions(texts: Sequence[GivenText]) -> Iterator[list[list[int]]]:
    """Batches of indices of texts, sorted by length, in lists that go through the models together."""
    lengths = [len(text.inputs) for text in texts]
    portion: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(texts)), key=lengths.__getitem__):
        length = lengths[index]
        if portion and tokens + length > PORTION_TOKENS:
            yield portion
            portion, tokens = [], 0
        if not portion or (len(portion[-1]) + 1) * length > BATCH_TOKENS:
            portion.append([])
        portion[-1].append(index)
        tokens += length
    if portion:
        yield portion


@contextmanager
def _running(
    reference: BlockRunner,
    artifact: Openable,
    texts: Sequence[GivenText],
    portion: Sequence[Sequence[int]],
    steps: Steps,
    name: str,
) -> Iterator[list[Logits]]:
    runners = [reference, artifact] if isinstance(artifact, BlockRunner) else [reference]
    states = _states(runners, [[texts[index] for index in batch] for batch in portion], steps, name)
    places = {index: (number, row) for number, batch in enumerate(portion) for row, index in enumerate(batch)}
    with ExitStack() as stack:
        heads = stack.enter_context(shared_heads(runners))
        models = [_by_blocks(texts, own, places, head) for own, head in zip(states, heads, strict=True)]
        if not isinstance(artifact, BlockRunner):
            models.append(_whole(texts, stack.enter_context(artifact.whole())))
        yield models


def _states(
    runners: Sequence[BlockRunner], batches: Sequence[Sequence[GivenText]], steps: Steps, name: str
) -> list[list[Batch]]:
    """Each model's hidden states after its last block."""
    blocks = len(runners[0].structure.blocks)
    steps.expect(blocks)
    inputs = [_padded([text.inputs for text in batch]) for batch in batches]
    tokens = len(runners) * sum(ids.numel() for ids in inputs)
    states = [runner.embed_batches(inputs) for runner in runners]
    for index in range(blocks):
        for runner, own in zip(runners, states, strict=True):
            with runner.block(index) as block:
                for batch in own:
                    runner.forward(index, block, batch)
        steps.finished_block(f"drift along {name}", index + 1, blocks, tokens)
    return states


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _by_blocks(
    texts: Sequence[GivenText], states: Sequence[Batch], places: dict[int, tuple[int, int]], head: Head
) -> Logits:
    def logits(index: int) -> Iterator[Tensor]:
        (number, row), text = places[index], texts[index]
        before = len(text.prompt) - 1
        for piece in states[number].hidden[row, before : before + len(text.tokens)].split(TOKENS_AT_ONCE):
            yield head(piece)[0]

    return logits


def _whole(texts: Sequence[GivenText], model: PreTrainedModel) -> Logits:
    def logits(index: int) -> Iterator[Tensor]:
        text = texts[index]
        ids = torch.tensor([text.inputs]).to(model.device)
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        yield from found[0, len(text.prompt) - 1 :].float().split(TOKENS_AT_ONCE)

    return logits
