"""A whole model run on prompts: its continuations, greedy or sampled, and its predictions along another model's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from qexport.architectures.architecture import Checkpoint
from qexport.errors import NumericalError
from qexport.tensors.source import is_finite
from qexport.text.file_names import GENERATION_CONFIG
from qexport.text.tokenizers import json_object
from qexport.verifying import SamplingSettings
from qexport.verifying.prompt_batches import PromptBatch


def sampling_noise(
    settings: SamplingSettings, ids: Sequence[str], sample: int, begins: Sequence[int] | None = None
) -> LogitsProcessorList:
    """Processors that turn the likeliest token into a sample: temperature, top-p, and Gumbel noise.

    The noise depends on seed, prompt, sample and position alone.

    Args:
        settings: the recipe's `verify.sampling`.
        ids: of the prompts of a batch, in its order.
        sample: which of the samples of each prompt, from 0.
        begins: for each prompt, the index of the new token that is chosen first; None for the first new token of all.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    generators = [_generator(settings.seed, sample, name) for name in ids]
    processors.append(_GumbelNoise(generators, begins or [0] * len(ids)))
    return processors


class _GumbelNoise(LogitsProcessor):
    def __init__(self, generators: Sequence[torch.Generator], begins: Sequence[int]) -> None:
        self._generators, self._skipped = generators, begins

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for generator, count in zip(self._generators, self._skipped, strict=True):
            for _ in range(count):
                _draw(generator, scores.shape[1])
        self._skipped = [0] * len(self._generators)
        draws = [_draw(generator, scores.shape[1]) for generator in self._generators]
        return scores - torch.stack(draws).log().to(scores.device)


def _draw(generator: torch.Generator, vocabulary: int) -> Tensor:
    return torch.empty(vocabulary).exponential_(generator=generator)


def _generator(seed: int, sample: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {sample} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


_LOGITS_AT_ONCE: Final = 1 << 24

Noise = Callable[[Sequence[int]], LogitsProcessorList]
"""From the indices of a batch's prompts to the processors that change their logits before the choice of a token."""


@dataclass(frozen=True)
class Continuation:
    """The new tokens after a prompt.

    Attributes:
        tokens: up to and including the first end token.
        margins: for each token, the difference of the log-probabilities of the likeliest and the second likeliest,
            in nats.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def greedy_settings(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding, up to a token that the model's files name as an end."""
    named = [json_object(checkpoint.files, GENERATION_CONFIG), checkpoint.config]
    ends = {token for config in named for token in _listed(config.get("eos_token_id"))}
    ends |= set(_listed(tokenizer.eos_token_id))
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )


def ends_of(settings: GenerationConfig) -> set[int]:
    """The tokens that end a text."""
    return set(_listed(settings.eos_token_id))


@torch.no_grad()
def continue_all(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    settings: GenerationConfig,
    finished: Callable[[], None],
    noise: Noise = lambda _: LogitsProcessorList(),
) -> list[Continuation]:
    """The likeliest new tokens for each prompt, in the order of the list that the batches came from.

    Args:
        model: with all its weights and, for the margins, a head in float32.
        batches: every prompt once.
        settings: from `greedy_settings`.
        finished: is called after each prompt.
        noise: for sampling; see `sampling_noise`.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    assert isinstance(model, GenerationMixin)
    found: dict[int, Continuation] = {}
    for batch in batches:
        margins = _Margins()
        output = model.generate(  # type: ignore[misc]  # transformers gives self the type of a protocol
            batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([margins, *noise(batch.indices)]),
        )
        assert isinstance(output, Tensor)
        rows = output[:, batch.input_ids.shape[1] :].tolist()
        for index, tokens, ahead in zip(batch.indices, rows, margins.rows(), strict=True):
            length = _length(tokens, ends_of(settings))
            found[index] = Continuation(tuple(tokens[:length]), tuple(ahead[:length]))
            finished()
    return [found[index] for index in sorted(found)]


@torch.no_grad()
def likeliest_along(
    model: PreTrainedModel, batches: Sequence[PromptBatch], continuations: Sequence[Continuation]
) -> list[tuple[int, ...]]:
    """For each prompt, the likeliest token at each position of a given continuation, predicted from the prompt and the
    tokens before that position: one forward over all of them.

    Args:
        model: with all its weights and a head in float32.
        batches: as for `continue_all`.
        continuations: at least one token for each prompt, in the order of the list that the batches came from.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    found: dict[int, tuple[int, ...]] = {}
    for batch in batches:
        longest = max(len(continuations[index].tokens) for index in batch.indices)
        rows = max(1, _LOGITS_AT_ONCE // (longest * _vocabulary(model)))
        pieces = (range(len(batch.indices))[first : first + rows] for first in range(0, len(batch.indices), rows))
        for piece in pieces:
            tokens = [continuations[batch.indices[row]].tokens for row in piece]
            tops = _likeliest(model, batch.input_ids[list(piece)], batch.attention_mask[list(piece)], tokens)
            found |= {batch.indices[row]: top for row, top in zip(piece, tops, strict=True)}
    return [found[index] for index in sorted(found)]


def _likeliest(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, continuations: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Shorter continuations are padded at the end, which no earlier token sees. The last token is left out, since
    nothing after it is predicted.
    """
    longest = max(map(len, continuations))
    follow = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in continuations])[:, :-1]
    ids, mask = torch.cat([prompts, follow], 1), torch.cat([mask, torch.ones_like(follow)], 1)
    rows = zip(_last_logits(model, ids, mask, longest), map(len, continuations), strict=True)
    return [tuple(finite(row[:length]).argmax(-1).tolist()) for row, length in rows]


def _last_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """The logits [rows, count, vocabulary] of the last columns; positions are counted from each row's first token."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    on_device: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**on_device, use_cache=False, logits_to_keep=count).logits
    assert isinstance(logits, Tensor)
    return logits


class _Margins(LogitsProcessor):
    """Records at each step the margin of the likeliest token, and changes nothing."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first, second = scores.topk(2).values.T
        margins = finite(first - second)  # the log of the sum cancels, so logits do
        self._steps.append(margins.cpu())
        return scores

    def rows(self) -> list[list[float]]:
        rows: list[list[float]] = torch.stack(self._steps, 1).tolist()
        return rows


def finite(values: Tensor) -> Tensor:
    """The values, checked.

    Raises:
        NumericalError: one is NaN or Inf.
    """
    if not is_finite(values):
        raise NumericalError(
            "the logits hold NaN or Inf",
            where="verify",
            mend="an activation overflows: compute in a wider dtype, or check the layer losses",
        )
    return values


def _length(tokens: Sequence[int], ends: set[int]) -> int:
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _listed(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]
