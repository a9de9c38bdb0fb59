"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner
from qexport.errors import NumericalError
from qexport.tensors.finite import is_finite

Head = Callable[[Tensor], Tensor]
"""From hidden states [..., tokens, hidden_size] to float32 logits [..., tokens, vocabulary]."""

_TOKENS_AT_ONCE: Final = 128
_DOUBLES_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True)
class TokenFigures:
    """Figures for every predicted token; natural logarithms. All tensors are on the CPU.

    Attributes:
        reference_nll: float64 [windows, sequence_length - 1], -log p(token) under the reference.
        artifact_nll: the same under the artifact.
        kl: float64 of the same shape, KL(reference || artifact) of the two distributions of the token.
        same_top: bool of the same shape, both models hold the same token for the likeliest.
    """

    reference_nll: Tensor
    artifact_nll: Tensor
    kl: Tensor
    same_top: Tensor

    @property
    def reference_perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of the reference."""
        return _perplexity(self.reference_nll)

    @property
    def artifact_perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of the artifact."""
        return _perplexity(self.artifact_nll)

    @property
    def mean_kl(self) -> float:
        """Mean over the tokens, in nats."""
        return _mean(self.kl)

    @property
    def top1_agreement(self) -> float:
        """Share of the tokens, 0 to 1."""
        return int(self.same_top.sum()) / self.same_top.numel()

    def reshape(self, windows: int) -> TokenFigures:
        """The same with one row a window."""
        return TokenFigures(**{field.name: getattr(self, field.name).reshape(windows, -1) for field in fields(self)})


@torch.no_grad()
def compare(
    reference: BlockRunner,
    artifact: BlockRunner,
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    input_ids: Tensor,
    finished: Callable[[int], None],
) -> TokenFigures:
    """Figures from the hidden states behind the last block. Logits are made, compared and dropped in small pieces.

    Every token of a window but the first is predicted, from the tokens before it in the window.

    Args:
        reference: the merged model.
        artifact: the artifact.
        batches: the two models' hidden states, as `run_in_lockstep` returns them.
        input_ids: int64 [windows, sequence_length].
        finished: is told after each batch how many windows are compared.

    Raises:
        NumericalError: a model's logits hold NaN or Inf.
    """
    targets = input_ids[:, 1:]
    parts: list[TokenFigures] = []
    first = 0
    with _heads(reference, artifact) as heads:
        for ours, theirs in zip(*batches, strict=True):
            last = first + len(ours.hidden)
            parts += _compare_hidden(heads, ours.hidden, theirs.hidden, targets[first:last])
            first = last
            finished(last)
    return _joined(parts).reshape(len(input_ids))


def compare_logits(reference: Tensor, artifact: Tensor, targets: Tensor) -> TokenFigures:
    """Figures of float logits [tokens, vocabulary] and int64 targets [tokens], computed in float64.

    With log-probabilities `p` and `q`: nll = -p[target], KL = sum over the vocabulary of exp(p) * (p - q). Each row is
    reduced by itself, so that neither the number of threads nor the size of the pieces matters.
    """
    rows = max(1, _DOUBLES_AT_ONCE // reference.shape[1])
    pieces = zip(reference.split(rows), artifact.split(rows), targets.split(rows), strict=True)
    return _joined([_compare_rows(*piece) for piece in pieces])


def _compare_rows(reference: Tensor, artifact: Tensor, targets: Tensor) -> TokenFigures:
    same_top = reference.argmax(-1) == artifact.argmax(-1)
    p, q = (torch.log_softmax(logits, -1, dtype=torch.float64) for logits in (reference, artifact))
    columns = targets.to(p.device)[:, None]
    reference_nll, artifact_nll = -p.gather(1, columns)[:, 0], -q.gather(1, columns)[:, 0]
    difference = q.neg_().add_(p)
    kl = _row_sums(difference.mul_(p.exp_()))
    return TokenFigures(reference_nll.cpu(), artifact_nll.cpu(), kl.cpu(), same_top.cpu())


def _row_sums(values: Tensor) -> Tensor:
    """Row by row: a lone row would be divided among torch's threads, and its last bits depend on their number."""
    return values.expand(2, -1).sum(-1)[:1] if len(values) == 1 else values.sum(-1)


def _compare_hidden(heads: tuple[Head, Head], ours: Tensor, theirs: Tensor, targets: Tensor) -> Iterator[TokenFigures]:
    """The figures of hidden states [windows, sequence_length, hidden_size]; what follows a window is not known."""
    own, other = (hidden[:, :-1].flatten(0, 1).split(_TOKENS_AT_ONCE) for hidden in (ours, theirs))
    for left, right, wanted in zip(own, other, targets.flatten().split(_TOKENS_AT_ONCE), strict=True):
        reference, artifact = _finite(heads[0](left)[0], "reference"), _finite(heads[1](right)[0], "artifact")
        yield compare_logits(reference, artifact, wanted)


def _finite(logits: Tensor, model: str) -> Tensor:
    if not is_finite(logits):
        raise NumericalError(
            f"the {model}'s logits hold NaN or Inf",
            where="verify",
            mend="an activation overflows: compute in a wider dtype (bfloat16 or float32), or look at the layer losses",
        )
    return logits


@contextmanager
def _heads(reference: BlockRunner, artifact: BlockRunner) -> Iterator[tuple[Head, Head]]:
    """Both heads; in memory only once where the artifact's is the reference's, bit for bit."""
    same = all(torch.equal(reference.read(name), artifact.read(name)) for name in _head_parameters(reference))
    with reference.head() as head, ExitStack() as stack:
        yield head, head if same else stack.enter_context(artifact.head())


def _head_parameters(runner: BlockRunner) -> list[str]:
    """What stands outside the blocks and behind them (a model may have other embeddings, which do no harm here)."""
    structure = runner.structure
    before = () if structure.tied else (f"{structure.embedding}.",)
    skipped = (*before, *(f"{block}." for block in structure.blocks))
    return [name for name in structure.parameters if not name.startswith(skipped)]


def _joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    names = [field.name for field in fields(TokenFigures)]
    return TokenFigures(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _mean(values: Tensor) -> float:
    """The exactly rounded sum over the number of values, whatever their order."""
    return math.fsum(values.flatten().tolist()) / values.numel()


def _perplexity(nll: Tensor) -> float:
    try:
        return math.exp(_mean(nll))
    except OverflowError as error:
        raise NumericalError("a perplexity is larger than any number", where="verify") from error
