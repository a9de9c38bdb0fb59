"""The speed of the reference in transformers and of the artifact: through a runtime, or, if there is only one program
that computes it, in this process.

Wall-clock figures differ from run to run, so they are kept apart from everything that is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qexport.amounts import size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.machine_memory import available_memory
from qexport.artifact.figures import Figure
from qexport.artifact.measurements import Pace, Speed
from qexport.reading.filled_model import unquantized_model
from qexport.reading.stored_model import StoredModel
from qexport.statistics.samples import ALPHA
from qexport.verifying import SpeedSettings
from qexport.verifying.memory import HEADROOM, bytes_in_memory, loaded_bytes


@dataclass(frozen=True)
class MeasuredSpeed:
    """The speed of both models, or why it was not measured.

    Attributes:
        speed: for the report; the reference is the merged model, unquantized, in its own dtype, and the artifact is as
            `qexport.load` returns it.
        unmeasured: why the speed was not measured; None if it was.
    """

    speed: Speed | None
    unmeasured: str | None = None

    @property
    def figures(self) -> list[Figure]:
        """The medians of the repeats' ratios."""
        return [] if self.speed is None else pace_figures(self.speed)


@dataclass(frozen=True)
class MeasuredPace:
    """The speed through a runtime, or why it was not measured.

    Attributes:
        pace: for the report.
        unmeasured: why not; None if it was measured.
    """

    pace: Pace | None
    unmeasured: str | None = None

    @property
    def figures(self) -> list[Figure]:
        """The medians of the repeats' ratios."""
        return [] if self.pace is None else pace_figures(self.pace)


class Continuing(Protocol):
    """A program or an endpoint that continues prompts."""

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, perhaps up to an end of text."""
        ...


def pace_figures(pace: Pace) -> list[Figure]:
    """The medians of the repeats' ratios."""
    ratios = {"speed_ratio": pace.speed_ratios, "first_token_ratio": pace.first_token_ratios}
    return [_median_figure(name, values) for name, values in ratios.items()]


@dataclass(frozen=True)
class Median:
    """A median with its 95 % interval."""

    value: float
    low: float
    high: float


def compare_speed(
    reference: Checkpoint,
    artifact: StoredModel,
    input_ids: Tensor,
    settings: SpeedSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MeasuredSpeed:
    """Loads both models as users do and measures them in turns, if both fit in memory.

    Quantized weights are not measured here: they are for runtimes, and the speed of our reader is none of theirs.

    Args:
        reference: the merged model.
        artifact: the artifact, complete.
        input_ids: int64, held-out tokens of any shape; the first `settings.prompt_tokens` are the prompt.
        settings: the recipe's `verify.speed`.
        dtype: of the reference; the artifact computes in its own.
        device: where to compute.
    """
    if artifact.kind != "graph" and artifact.layers:
        return MeasuredSpeed(None, _FOR_RUNTIMES)
    prompt = input_ids.flatten()[: settings.prompt_tokens][None]
    if reason := _obstacle(reference, artifact, prompt.shape[1] + settings.new_tokens, dtype, device):
        return MeasuredSpeed(None, reason)
    own = unquantized_model(reference.architecture, reference.weights, dtype=dtype, device=device)
    other = artifact.model(device=device)
    for model in (own, other):
        model.generation_config = GenerationConfig()  # no end token, no penalties
    return MeasuredSpeed(measure_speed((own, other), prompt, settings))


_FOR_RUNTIMES: Final = "it is the runtime's, and is measured through one: verify.through or --through"


def compare_pace(
    reference: Checkpoint,
    runtime: Continuing,
    input_ids: Tensor,
    settings: SpeedSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MeasuredPace:
    """Measures the reference in this process and a runtime that has loaded the artifact, in turns.

    Each repeat has a prompt of its own, as far as the text reaches, since servers keep what they have read. A runtime
    is asked three times: for one token of a new prompt, which is the time to the first token; and then, when it may
    have kept the prompt, for one token and for all of them, whose difference is the time of the further tokens.

    Args:
        reference: the merged model.
        runtime: has loaded the artifact.
        input_ids: int64, held-out tokens of any shape.
        settings: the recipe's `verify.speed`.
        dtype: of the reference.
        device: where the reference computes.

    Raises:
        InputError: the runtime fails.
    """
    if reason := _obstacle(reference, None, settings.prompt_tokens + settings.new_tokens, dtype, device):
        return MeasuredPace(None, reason)
    own = unquantized_model(reference.architecture, reference.weights, dtype=dtype, device=device)
    own.generation_config = GenerationConfig()  # no end token, no penalties
    prompts = input_ids.flatten()[: input_ids.numel() // settings.prompt_tokens * settings.prompt_tokens]
    if not len(prompts):
        return MeasuredPace(None, f"the text has fewer than {settings.prompt_tokens} tokens")
    prompts = prompts.reshape(-1, settings.prompt_tokens)
    ours, theirs = list[list[float]](), list[tuple[float, float]]()
    for repeat in range(-1, settings.repeats):  # the first is not counted
        prompt = prompts[(repeat + 1) % len(prompts)]
        for which in ("own", "runtime") if repeat % 2 else ("runtime", "own"):
            if which == "own":
                ours.append(_times(own, prompt[None], settings.new_tokens))
                continue
            if (found := _ask(runtime, prompt.tolist(), settings.new_tokens)) is None:
                return MeasuredPace(None, f"it gave fewer than {settings.new_tokens} tokens, or no slower than one")
            theirs.append(found)
    counted = np.asarray(ours[1:], dtype=np.float64)
    return MeasuredPace(
        Pace(
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            reference_tokens_per_second=_tokens_per_second(counted),
            artifact_tokens_per_second=[speed for _, speed in theirs[1:]],
            reference_first_token_seconds=counted[:, 0].tolist(),
            artifact_first_token_seconds=[first for first, _ in theirs[1:]],
        )
    )


def _ask(runtime: Continuing, prompt: list[int], new_tokens: int) -> tuple[float, float] | None:
    """Seconds to the first token, and tokens per second after it."""
    first, _ = _timed(runtime, prompt, 1)
    one, _ = _timed(runtime, prompt, 1)
    whole, count = _timed(runtime, prompt, new_tokens)
    if count != new_tokens or whole <= one:
        return None
    return first, (new_tokens - 1) / (whole - one)


def _timed(runtime: Continuing, prompt: list[int], new_tokens: int) -> tuple[float, int]:
    """Seconds, and the number of tokens that came."""
    start = perf_counter()
    (tokens,) = runtime.continued([prompt], new_tokens)
    return perf_counter() - start, len(tokens)


def measure_speed(models: tuple[PreTrainedModel, PreTrainedModel], prompt: Tensor, settings: SpeedSettings) -> Speed:
    """Both models continue the prompt in turns, in alternating order, after one unmeasured warm-up of each.

    Args:
        models: the reference and the artifact.
        prompt: int64 [1, tokens].
        settings: the recipe's `verify.speed`.
    """
    clocks: tuple[list[list[float]], list[list[float]]] = ([], [])
    for model in models:
        _times(model, prompt, settings.new_tokens)
    for repeat in range(settings.repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            clocks[which].append(_times(models[which], prompt, settings.new_tokens))
    own, other = (np.asarray(each, dtype=np.float64) for each in clocks)
    return Speed(
        prompt_tokens=prompt.shape[1],
        new_tokens=settings.new_tokens,
        reference_tokens_per_second=_tokens_per_second(own),
        artifact_tokens_per_second=_tokens_per_second(other),
        reference_first_token_seconds=own[:, 0].tolist(),
        artifact_first_token_seconds=other[:, 0].tolist(),
        reference_bytes=int(models[0].get_memory_footprint()),
        artifact_bytes=int(models[1].get_memory_footprint()),
    )


def _tokens_per_second(times: NDArray[np.float64]) -> list[float]:
    """From seconds [repeats, tokens] since the start; the first token is not counted."""
    speed: list[float] = ((times.shape[1] - 1) / (times[:, -1] - times[:, 0])).tolist()
    return speed


def median_interval(values: Sequence[float]) -> Median:
    """The median and a 95 % interval between two order statistics, for any distribution.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 - 2 P(X < k), where X is
    binomial(n, 1/2); k is the largest for which that is at least 95 % (David and Nagaraja, Order Statistics, 7.1).

    Args:
        values: at least 6; fewer give no 95 % interval.
    """
    ordered = sorted(float(value) for value in values)
    count = len(ordered)
    if not _is_enclosed(count, 1):
        raise ValueError("a 95 % interval of a median needs 6 values")
    rank = max(rank for rank in range(1, count // 2 + 1) if _is_enclosed(count, rank))
    return Median(float(np.median(ordered)), ordered[rank - 1], ordered[-rank])


def _median_figure(name: str, values: Sequence[float]) -> Figure:
    """Gates are decided on the same interval, since the number of repeats is fixed beforehand."""
    found = median_interval(values)
    return Figure(
        name=name,
        value=found.value,
        low=found.low,
        high=found.high,
        sequence_low=found.low,
        sequence_high=found.high,
        n=len(values),
        unit="repeat",
    )


def _is_enclosed(count: int, rank: int) -> bool:
    outside = sum(math.comb(count, below) for below in range(rank)) / 2.0 ** (count - 1)
    return outside <= ALPHA


class _Clock(LogitsProcessor):
    """Records the time at which the logits of each new token are computed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _wait(scores.device)
        self.times.append(perf_counter())
        return scores


@torch.no_grad()
def _times(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> list[float]:
    """Seconds from the start to each new token."""
    assert isinstance(model, GenerationMixin)
    clock, prompt = _Clock(), prompt.to(model.device)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    _wait(model.device)
    start = perf_counter()
    model.generate(  # type: ignore[misc]  # transformers gives self the type of a protocol
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        logits_processor=LogitsProcessorList([clock]),
    )
    return [time - start for time in clock.times]


def _obstacle(
    reference: Checkpoint, artifact: StoredModel | None, length: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why there is no room; a runtime (None) looks after its own."""
    structure = reference.architecture.structure
    if structure.positions is not None and length > structure.positions:
        return f"{length} tokens are more than the {structure.positions} positions of the model"
    stored = 0 if artifact is None else loaded_bytes(artifact, structure, dtype)
    needed, free = HEADROOM * (bytes_in_memory(structure, dtype) + stored), available_memory(device)
    if needed > free and artifact is None:
        return f"the reference needs {size(needed, decimals=1)}, {size(free, decimals=1)} are free"
    if needed > free:
        return f"both models together need {size(needed, decimals=1)}, {size(free, decimals=1)} are free"
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
