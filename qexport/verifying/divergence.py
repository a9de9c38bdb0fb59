"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner
from qexport.errors import NumericalError
from qexport.tensors.source import is_finite
from qexport.verifying.predictors import TOKENS_AT_ONCE, Predictor, two_predictors, windows_at_once

DOUBLES_AT_ONCE: Final = 1 << 17
"""Values of each model whose log-probabilities are in memory in float64 at a time: so many stay in a core's cache."""


Pair = tuple[int, int]
"""Which model is the reference and which the artifact, as indices into the models that were run."""


@dataclass(frozen=True)
class TokenFigures:
    """Figures for every predicted token; natural logarithms. All tensors are on the CPU and of the same shape,
    [windows, sequence_length - 1].

    Attributes:
        reference_nll: float64, -log p(token) under the reference.
        artifact_nll: the same under the artifact.
        kl: float64, KL(reference || artifact) of the two distributions of the token.
        margin: float64, the difference of the log-probabilities of the reference's likeliest and second likeliest
            token.
        reference_top: int32, the reference's likeliest token; of equally likely ones the one with the lowest id.
        artifact_top: the artifact's.
    """

    reference_nll: Tensor
    artifact_nll: Tensor
    kl: Tensor
    margin: Tensor
    reference_top: Tensor
    artifact_top: Tensor

    @property
    def flipped(self) -> Tensor:
        """Bool: the two models have different likeliest tokens."""
        return self.reference_top != self.artifact_top

    @property
    def probability_change(self) -> Tensor:
        """float64, the true token's probability under the artifact minus that under the reference."""
        return self.artifact_nll.neg().exp() - self.reference_nll.neg().exp()

    def reshape(self, windows: int) -> TokenFigures:
        """The same with one row per window."""
        return TokenFigures(**{field.name: getattr(self, field.name).reshape(windows, -1) for field in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[TokenFigures]) -> TokenFigures:
        """The tokens of all parts, one part after the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@torch.no_grad()
def compare(
    models: Sequence[Predictor], pairs: Sequence[Pair], input_ids: Tensor, finished: Callable[[int], None]
) -> list[TokenFigures]:
    """Figures from the models' logits, which are made, compared and dropped in small pieces.

    Every token of a window but the first is predicted, from the tokens before it in the window.

    Args:
        models: their predictions.
        pairs: which models to compare.
        input_ids: int64 [windows, sequence_length].
        finished: is called after each batch with the number of windows compared so far.

    Returns:
        The figures of each pair.

    Raises:
        NumericalError: a model's logits hold NaN or Inf.
    """
    at_once, parts = windows_at_once(input_ids.shape[1]), list[list[TokenFigures]]()
    for first in range(0, len(input_ids), at_once):
        windows = range(first, min(first + at_once, len(input_ids)))
        parts.append(compare_batch(models, pairs, input_ids, windows))
        finished(windows.stop)
    return [TokenFigures.joined(own) for own in zip(*parts, strict=True)]


@torch.no_grad()
def compare_batch(
    models: Sequence[Predictor], pairs: Sequence[Pair], input_ids: Tensor, windows: range
) -> list[TokenFigures]:
    """The same for one batch of windows, which all models have."""
    logits, targets = [model.logits(windows) for model in models], input_ids[windows.start : windows.stop, 1:]
    found = zip(*_compare_pieces(logits, pairs, targets), strict=True)
    return [TokenFigures.joined(own).reshape(len(targets)) for own in found]


def compare_two(
    runners: tuple[BlockRunner, BlockRunner], batches: tuple[Sequence[Batch], Sequence[Batch]], input_ids: Tensor
) -> TokenFigures:
    """Figures of a model that was run block by block beside its reference.

    Args:
        runners: the reference and the model.
        batches: the hidden states of each after the last block.
        input_ids: int64 [windows, sequence_length].

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    with two_predictors(runners, batches) as models:
        (figures,) = compare(models, [(0, 1)], input_ids, lambda _: None)
    return figures


def compare_logits(logits: Sequence[Tensor], pairs: Sequence[Pair], targets: Tensor) -> list[TokenFigures]:
    """Figures of each model's float logits [tokens, vocabulary] and int64 targets [tokens], computed in float64.

    With log-probabilities `p` and `q`: nll = -p[target], KL = sum over the vocabulary of exp(p) * (p - q). Each row is
    reduced by itself, so that neither the number of threads nor the size of the pieces changes the bits.
    """
    rows = max(1, DOUBLES_AT_ONCE // logits[0].shape[1])
    pieces = zip(*(each.split(rows) for each in logits), strict=True)
    found = [_compare_rows(piece, pairs, wanted) for piece, wanted in zip(pieces, targets.split(rows), strict=True)]
    return [TokenFigures.joined(own) for own in zip(*found, strict=True)]


def _compare_rows(logits: Sequence[Tensor], pairs: Sequence[Pair], targets: Tensor) -> list[TokenFigures]:
    models = [_Predictions.of(each, targets) for each in logits]
    return [models[first].against(models[second]) for first, second in pairs]


@dataclass(frozen=True)
class _Predictions:
    """One model's distributions of some tokens.

    Attributes:
        logits: float [tokens, vocabulary].
        log_probabilities: float64 [tokens, vocabulary].
        nll: float64 [tokens], of the targets.
        top: the likeliest token.
    """

    logits: Tensor
    log_probabilities: Tensor
    nll: Tensor
    top: Tensor

    @cached_property
    def _probabilities(self) -> Tensor:
        return self.log_probabilities.exp()

    @cached_property
    def _margin(self) -> Tensor:
        best = self.logits.topk(2, -1).values.to(torch.float64)
        return best[:, 0] - best[:, 1]

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> _Predictions:
        log_probabilities = torch.log_softmax(logits, -1, dtype=torch.float64)
        nll = -log_probabilities.gather(1, targets.to(logits.device)[:, None])[:, 0]
        return cls(logits, log_probabilities, nll, logits.argmax(-1))

    def against(self, other: _Predictions) -> TokenFigures:
        difference = self.log_probabilities - other.log_probabilities
        kl = _row_sums(difference.mul_(self._probabilities)).clamp(min=0.0)  # rounding alone can make it negative
        tops = (each.top.to(torch.int32).cpu() for each in (self, other))
        return TokenFigures(self.nll.cpu(), other.nll.cpu(), kl.cpu(), self._margin.cpu(), *tops)


def _row_sums(values: Tensor) -> Tensor:
    """Row by row: torch divides a single row among its threads, and the sum's last bits depend on their number."""
    return values.expand(2, -1).sum(-1)[:1] if len(values) == 1 else values.sum(-1)


def _compare_pieces(
    logits: Sequence[Iterator[Tensor]], pairs: Sequence[Pair], targets: Tensor
) -> Iterator[list[TokenFigures]]:
    """The figures of a batch of windows. A window's last token predicts nothing: what follows it is not known."""
    for *pieces, wanted in zip(*logits, targets.flatten().split(TOKENS_AT_ONCE), strict=True):
        yield compare_logits([_finite(piece) for piece in pieces], pairs, wanted)


def _finite(logits: Tensor) -> Tensor:
    if not is_finite(logits):
        raise NumericalError(
            "a model's logits hold NaN or Inf",
            where="verify",
            mend="an activation overflows: compute in a wider dtype (bfloat16 or float32), or check the layer losses",
        )
    return logits
