"""What verification measures besides its figures: distribution of the drift, continuations, tasks, speed."""

from __future__ import annotations

from datetime import datetime

from qexport.artifact.figures import Figure
from qexport.records import Record, added


class Histogram(Record):
    """The number of tokens per range of the KL divergence."""

    edges: list[float]
    """In nats, rising; one more than bins. Values below the first edge and above the last are in the outer bins."""

    counts: list[int]


class MarginBin(Record):
    """Tokens by the reference's margin: the difference of its two likeliest tokens' log-probabilities, in nats."""

    low: float
    high: float | None
    """None: no upper end."""

    tokens: int

    flips: int
    """Those for which the artifact's likeliest token is another one."""


class BlockDrift(Record):
    """How far the hidden states after a block are from the reference's."""

    name: str

    relative_error: float
    """Norm of the difference / norm of the reference's, over the measured windows of the first round."""


class WorstToken(Record):
    """A token where the artifact is far from the reference."""

    domain: str | None
    window: int
    position: int

    before: str
    """The text before it, cut to its last characters."""

    token: str
    kl: float
    reference_top: str
    reference_probability: float
    """Of the token in the text; the artifact's too."""

    artifact_top: str
    artifact_probability: float


class LayerWeights(Record):
    """A quantized layer's weights, held against the reference's."""

    name: str
    """The module's path."""

    exact: bool
    """The codes are exactly those that the method gives for the reference's weights; the rest is then not judged."""

    relative_error: float
    """Norm of the difference of the dequantized weights from the reference's / norm of the reference's."""

    nearest_error: float
    """The same for the reference's weights rounded to nearest on the very grids that are stored."""

    output_error: float | None = added()
    """The same for the layer's outputs on inputs that the reference has on held-out text; None where they were not
    measured: `exact` layers, experts, and the layers of a graph.
    """

    nearest_output_error: float | None = added()
    """The same for the outputs of the weights rounded to nearest."""

    gain: float
    """Product of the weights and the reference's / that of the nearest ones and the reference's: 1.1 if all weights are
    1.1 times as large.
    """

    adapter_survival: float | None = added()
    """How much of the adapter's change is left in this layer after all rounding (the figure of that name); None where
    it changes nothing.
    """

    worst_row: int
    """The row whose error is the largest multiple of its error from rounding to nearest."""

    worst_row_ratio: float
    """That multiple."""

    worst_group: tuple[int, int] | None
    """Row and number of the group whose error is the largest multiple; None where a row has one scale."""

    worst_group_ratio: float | None
    """That multiple."""

    faults: list[str]
    """What no sound layer has, the plainest one first."""

    @property
    def ratio(self) -> float | None:
        """The error as a multiple of that of rounding to nearest; None if that is 0."""
        return self.relative_error / self.nearest_error if self.nearest_error else None

    @property
    def output_ratio(self) -> float | None:
        """The same for the outputs; None also where they were not measured."""
        if self.output_error is None or not self.nearest_output_error:
            return None
        return self.output_error / self.nearest_output_error


class TensorFault(Record):
    """An unquantized tensor that is not the reference's."""

    name: str
    text: str
    """How much of it differs, and where."""


class WeightsRecord(Record):
    """All weights of the artifact, held against the reference's."""

    unquantized: int
    """Tensors without codes."""

    unequal: list[TensorFault]
    """Those of them that are not equal to the reference's, in the coarser one of both dtypes."""

    layers: list[LayerWeights]
    """The quantized layers, in the order of the files."""


class PromptComparison(Record):
    """The greedy continuations of one prompt. Tokens are counted up to and including an end token."""

    id: str
    domain: str | None
    style: str | None
    pair: str | None

    prompt: str
    """As plain text; one message per line."""

    reference: str
    """The reference's text, without special tokens."""

    artifact: str

    reference_tokens: int
    """At least 1."""

    artifact_tokens: int

    first_difference: int | None
    """Index of the first new token that differs; None where all are equal."""

    margin: float | None
    """The reference's margin there, in nats."""

    flips: int
    """Decisive flips along the reference's own tokens: those whose margin was above
    `qexport.artifact.figures.DECISIVE_MARGIN` and for which the artifact's likeliest token is another one, given the
    prompt and the reference's tokens before it.
    """

    edit_distance: float
    """Of the tokens, 0 to 1; this and the next figures are defined in `qexport.verifying.generation`."""

    chrf: float
    """0 to 100."""

    rouge_l: float
    """0 to 1."""

    reference_repetition: float
    artifact_repetition: float

    reference_hit_limit: bool
    """The reference had not ended when it reached the largest number of new tokens."""

    artifact_hit_limit: bool

    @property
    def identical(self) -> bool:
        """Whether all tokens are equal."""
        return self.first_difference is None

    @property
    def agreed_share(self) -> float:
        """Share of the reference's tokens before the first difference, 0 to 1; 1 where all tokens are equal."""
        return 1.0 if self.first_difference is None else self.first_difference / self.reference_tokens

    @property
    def length_ratio(self) -> float:
        """The number of the artifact's tokens divided by the reference's."""
        return self.artifact_tokens / self.reference_tokens


class SampledComparison(Record):
    """Continuations sampled by both models with the same seed."""

    id: str

    sample: int
    """Which of the prompt's samples, from 0."""

    seed: int
    reference: str
    artifact: str
    chrf: float


class Generations(Record):
    """Continuations of the prompts."""

    prompts: int
    identical: int
    max_new_tokens: int
    comparisons: list[PromptComparison]
    samples: list[SampledComparison]
    skipped: dict[str, str]
    """Prompts that were not continued, by their id, and why."""


class TaskRecord(Record):
    """A task of lm-evaluation-harness, paired by item."""

    task: str
    metric: str

    num_fewshot: int
    """Solved examples before each item."""

    sha256: str
    """Of the items: accuracies are comparable only where it is equal."""

    items: int
    reference_accuracy: float
    artifact_accuracy: float
    only_reference: int
    """Items that only the reference got right."""

    only_artifact: int
    p_value: float
    """Exact two-sided McNemar test."""

    smallest_drop: float | None = added()
    """The smallest drop of accuracy that so many items show with a probability of 80 %, if one answer in ten changes:
    known before the measurement."""


class Pace(Record):
    """The speed of the reference, in transformers, and of the artifact, measured in turn. Lists have one value per
    repeat.
    """

    prompt_tokens: int
    """Read before the first new token."""

    new_tokens: int
    """Generated."""

    reference_tokens_per_second: list[float]
    """Of the new tokens after the first."""

    artifact_tokens_per_second: list[float]
    reference_first_token_seconds: list[float]
    """From the prompt to the first new token."""

    artifact_first_token_seconds: list[float]

    @property
    def speed_ratios(self) -> list[float]:
        """Per repeat, the artifact's tokens per second divided by the reference's: above 1 is faster."""
        return _ratios(self.artifact_tokens_per_second, self.reference_tokens_per_second)

    @property
    def first_token_ratios(self) -> list[float]:
        """Per repeat, the artifact's time to first token divided by the reference's: below 1 is faster."""
        return _ratios(self.artifact_first_token_seconds, self.reference_first_token_seconds)


class Speed(Pace):
    """The speed and the memory of both models in this process: of an ONNX graph, or of unquantized weights."""

    reference_bytes: int
    """Parameters and buffers in memory."""

    artifact_bytes: int


def _ratios(artifact: list[float], reference: list[float]) -> list[float]:
    return [own / other for own, other in zip(artifact, reference, strict=True)]


class Timings(Record):
    """What differs from run to run."""

    seconds: float
    """How long verification took."""

    finished: datetime | None = added()
    """When it ended, in UTC; None in reports of versions that did not record it."""

    peak_memory_bytes: int | None
    """The process's peak resident main memory since its start: in a run the work before verification counts too."""

    speed: Speed | None
    speed_unmeasured: str | None
    """Why `speed` is None."""

    figures: list[Figure]
