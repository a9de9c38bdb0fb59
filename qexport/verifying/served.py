"""An artifact as a runtime computes it, compared with the merged reference and with our float32 reading of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import CheckResult, Figure, GateResult
from qexport.artifact.served import RuntimeFacts
from qexport.errors import InputError, NumericalError, listed
from qexport.formats.stored_weight import input_roundings
from qexport.gates.deciding import needs_more
from qexport.progress import Steps
from qexport.reading.stored_model import StoredModel
from qexport.statistics.means import PLANNED_UNITS
from qexport.statistics.samples import DIFFERENCE, NOT_NEGATIVE, SHARE
from qexport.tensors.source import is_finite
from qexport.text.tokenizers import tokenize
from qexport.text.torture import TORTURE
from qexport.verifying.continuation import ends_of, greedy_settings
from qexport.verifying.divergence import TokenFigures, compare
from qexport.verifying.estimates import decisive_flips, divergence_figures, relative_difference
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.predictors import in_pieces, most_windows_at_once, predictors
from qexport.verifying.reference import Reference
from qexport.verifying.rounds import looks_at
from qexport.verifying.units import Units, document_units, measured_once

PROMPT_TOKENS: Final = 32
NEW_TOKENS: Final = 16
_CHECKED: Final = 8
"""Windows whose text a runtime's tokenizer is given."""

_CONTINUED: Final = 8
"""Windows whose beginnings a runtime continues."""

TIE: Final = 0.5
"""Nats: where our choice is no further ahead, another token is no other decision."""


def most_tokens(sequence_length: int) -> int:
    """The tokens that a runtime must have room for: those of a window, or of a prompt with its continuation; and one
    more, since programs generate a token where they are asked for scores alone.
    """
    return max(sequence_length, min(PROMPT_TOKENS, sequence_length - 1) + NEW_TOKENS) + 1


class Continuing(Protocol):
    """A program or an endpoint that continues prompts."""

    facts: RuntimeFacts

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, perhaps up to an end of text."""
        ...


class Runtime(Continuing, Protocol):
    """A program that gives the log-probabilities of a window's whole vocabulary."""

    def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """float32 [tokens - 1, vocabulary] in pieces of at most `TOKENS_AT_ONCE`."""
        ...


class ServedPredictor:
    """Predictions of a runtime, window after window. See `Predictor`.

    Args:
        runtime: the runtime.
        input_ids: int64 [windows, sequence_length].
        vocabulary: the model's; a runtime may pad its own.
    """

    def __init__(self, runtime: Runtime, input_ids: Tensor, vocabulary: int) -> None:
        self._runtime, self._input_ids, self._vocabulary = runtime, input_ids, vocabulary

    @property
    def windows(self) -> int:
        """All of them."""
        return len(self._input_ids)

    def logits(self, windows: range) -> Iterator[Tensor]:
        """See `Predictor`.

        Raises:
            InputError: the runtime gives fewer log-probabilities than there are tokens in the vocabulary.
            NumericalError: they hold NaN.
        """
        return in_pieces(rows for window in windows for rows in self._rows(window))

    def _rows(self, window: int) -> Iterator[Tensor]:
        for rows in self._runtime.logits(self._input_ids[window].tolist()):
            if rows.shape[1] < self._vocabulary:
                raise InputError(
                    f"{self._runtime.facts.name} has {rows.shape[1]} tokens, the model {self._vocabulary}",
                    mend="check that the runtime serves this artifact",
                )
            if not is_finite(own := rows[:, : self._vocabulary]):
                raise NumericalError(
                    f"the log-probabilities of {self._runtime.facts.name} hold NaN or Inf",
                    where=f"held-out window {window}",
                    mend="an activation overflows: try another dtype",
                )
            yield own


def measure_served(
    runtime: Runtime,
    artifact: StoredModel,
    reference: Reference,
    decide: Callable[[Sequence[Figure]], Sequence[GateResult]],
    steps: Steps,
) -> list[Figure]:
    """Measures until the runtime's gates are decided or the text is used up.

    Args:
        runtime: serves the artifact.
        artifact: the same folder.
        reference: what to compare it with.
        decide: decides the runtime's gates.
        steps: counts the steps.

    Returns:
        The figures of the runtime against the reference, and of its fidelity.

    Raises:
        InputError: the runtime fails, or serves a model with a smaller vocabulary.
        NumericalError: log-probabilities hold NaN or Inf.
    """
    ids, quality = reference.held_out.input_ids, list[TokenFigures]()
    figures, fidelity = list[Figure](), list[Figure]()
    for first, last in looks_at(len(ids), reference.settings.windows):
        ours = [] if quality else [own_reading(artifact, reference.device)]
        found = _compare(runtime, ours, reference, ids[first:last], steps)
        quality.append(found[0])
        fidelity += _fidelity(found, reference) if ours else []
        figures = [*_quality(TokenFigures.joined(quality), reference), *fidelity]
        if not needs_more(decide(figures)):
            break
    steps.expect(1)
    figures.append(_continuations(runtime, artifact, reference))
    steps.finished(f"continuations through {runtime.facts.name}")
    return figures


def own_reading(artifact: StoredModel, device: torch.device) -> BlockRunner:
    """The artifact in float32, block by block, with rounded activations if so: what a runtime should compute."""
    dtype = torch.float32
    runner = BlockRunner(artifact.architecture.in_dtype(dtype), artifact, dtype=dtype, device=device)
    runner.round_inputs(input_roundings(artifact.layers))
    return runner


def _compare(
    runtime: Runtime, ours: Sequence[BlockRunner], reference: Reference, input_ids: Tensor, steps: Steps
) -> list[TokenFigures]:
    """The runtime against the reference; with our reading also the runtime against it, and it against the reference."""
    runners = [reference.runner(reference.merged), *ours]
    depth, tokens = len(runners[0].structure.blocks), len(runners) * input_ids.numel()
    batches = -(-len(input_ids) // most_windows_at_once(input_ids.shape[1]))
    steps.expect(depth + batches)
    through = "text through the reference and our float32 reading" if ours else "text through the reference"
    states, _ = run_in_lockstep(
        runners, input_ids, lambda block: steps.finished_block(through, block, depth, tokens), drift=False
    )
    pairs = [(0, 2), (1, 2), (0, 1)] if ours else [(0, 1)]
    with predictors(runners, states) as known:
        served = ServedPredictor(runtime, input_ids, runners[0].structure.vocab_size)
        words = f"predictions of {runtime.facts.name}"
        return compare([*known, served], pairs, input_ids, lambda _: steps.finished(words))


def _quality(tokens: TokenFigures, reference: Reference) -> list[Figure]:
    return divergence_figures(tokens, document_units(reference.held_out, len(tokens.kl), PLANNED_UNITS))


def _fidelity(found: Sequence[TokenFigures], reference: Reference) -> list[Figure]:
    """On the windows of the first look. The gate is decided on the interval for that number: more are never added."""
    quality, fidelity, reading = found
    units = document_units(reference.held_out, len(fidelity.kl), PLANNED_UNITS)
    relative = relative_difference(units.means(quality.kl), units.means(reading.kl))
    figures = [
        units.mean("fidelity_kl", units.means(fidelity.kl), NOT_NEGATIVE),
        units.mean("fidelity_top1", units.means(~fidelity.flipped), SHARE, trials=1),
        units.mean("fidelity_flips", units.means(decisive_flips(fidelity)), SHARE, trials=1),
        units.mean("kl_over_reading", relative, DIFFERENCE),
    ]
    return [measured_once(figure) for figure in figures]


class Tokenizing(Protocol):
    """A program that may have a tokenizer of its own."""

    def tokenized(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of each text, special ones included; None if it takes tokens alone."""
        ...


def check_tokenizer(runtime: Tokenizing, reference: Reference) -> list[CheckResult]:
    """Whether a runtime's tokenizer gives the reference's tokens; no check for one that takes tokens alone.

    The texts are those that similar tokenizers encode differently, and held-out text. Where the reference normalizes
    text, those that are not in that form are left out: runtimes without that step leave it to their users.

    Args:
        runtime: the runtime.
        reference: with the tokenizer.
    """
    tokenizer = reference.tokenizer
    texts = [
        *TORTURE.values(),
        *(str(tokenizer.decode(row)) for row in reference.held_out.input_ids[:_CHECKED].tolist()),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (normalizer := backend.normalizer) is not None:
        texts = [text for text in texts if normalizer.normalize_str(text) == text]
    if (found := runtime.tokenized(texts)) is None:
        return []
    wanted = [tokenize(tokenizer, text, special_tokens=True) for text in texts]
    other = [text for text, own, their in zip(texts, wanted, found, strict=True) if own != their]
    detail = (
        f"other tokens of {listed([f'{text!r:.40}' for text in other])}" if other else f"{len(texts)} texts are equal"
    )
    return [CheckResult(gate="tokenizer", name="tokenizer of the runtime", passed=not other, detail=detail)]


@contextmanager
def _predictions(runner: BlockRunner, input_ids: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of a few short texts, float32 [texts, tokens, vocabulary]."""
    (batches,), _ = run_in_lockstep([runner], input_ids, lambda _: None, drift=False)
    with runner.head() as head:
        yield torch.cat([head(batch.hidden) for batch in batches]).log_softmax(-1)


def _continuations(runtime: Runtime, artifact: StoredModel, reference: Reference) -> Figure:
    settings = greedy_settings(reference.merged, reference.tokenizer, max_new_tokens=NEW_TOKENS)
    ours, ids = own_reading(artifact, reference.device), reference.held_out.input_ids
    return judge_continuations(runtime, ours, ids, ends_of(settings))


@torch.no_grad()
def judge_continuations(
    runtime: Continuing,
    ours: BlockRunner,
    input_ids: Tensor,
    ends: Collection[int],
) -> Figure:
    """`fidelity_continuations`: how many of the runtime's greedy tokens are our choice after the same text, up to ties.

    Args:
        runtime: continues prompts.
        ours: our float32 reading.
        input_ids: held-out windows, whose beginnings are continued.
        ends: the tokens that end a text; what a runtime gives behind one is not judged.

    Raises:
        InputError: a token of the runtime is none of the model's.
    """
    prompts = input_ids[:_CONTINUED, : min(PROMPT_TOKENS, input_ids.shape[1] - 1)]
    texts = [_up_to_end(row[:NEW_TOKENS], ends) for row in runtime.continued(prompts.tolist(), NEW_TOKENS)]
    _refuse_unknown_tokens(texts, ours.structure.vocab_size, runtime.facts.name)
    filled = torch.tensor([row + [0] * (NEW_TOKENS - len(row)) for row in texts], dtype=torch.int64)
    with _predictions(ours, torch.cat([prompts, filled], 1)) as known:
        chosen = known[:, prompts.shape[1] - 1 : -1].cpu()
    behind = chosen.amax(-1) - chosen.gather(2, filled[..., None])[..., 0]
    shares = [
        float((behind[index, : len(row)] <= TIE).double().mean()) if row else 0.0 for index, row in enumerate(texts)
    ]
    units = Units([None] * len(shares), "prompt", None, len(shares))
    return units.mean("fidelity_continuations", np.asarray(shares), SHARE, trials=NEW_TOKENS)


def _refuse_unknown_tokens(texts: Sequence[Sequence[int]], vocabulary: int, name: str) -> None:
    unknown = [(index, token) for index, row in enumerate(texts) for token in row if not 0 <= token < vocabulary]
    if unknown:
        index, token = unknown[0]
        raise InputError(
            f"{name} gives the token {token}, the model has {vocabulary}",
            where=f"the continuation of held-out window {index}",
            mend="check that the runtime serves this artifact",
        )


def _up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))]
