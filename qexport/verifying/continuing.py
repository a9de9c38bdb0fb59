"""The prompts continued by both models: as whole models, one after the other, or block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from qexport.architectures.lazy_model import in_float32
from qexport.architectures.runner import BlockRunner
from qexport.progress import Steps
from qexport.reading.stored_model import StoredModel
from qexport.text.prompts import EncodedPrompts
from qexport.verifying import SamplingSettings
from qexport.verifying.continuation import Continuation, continue_all, likeliest_along, sampling_noise
from qexport.verifying.decoding import Draft, Drafter, Text, decode, keep_guesses
from qexport.verifying.kept import NOTHING_KEPT, Kept
from qexport.verifying.prompt_batches import Padding, PromptBatch, batch_prompts, check_padding
from qexport.verifying.tasks.measuring import OpenModel


class Openable(Protocol):
    """A model that can be loaded into memory as a whole."""

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with all its weights, which are released at the end; its logits are float32, or the graph's."""
        ...


@dataclass(frozen=True)
class Task:
    """What both models continue, and how.

    Attributes:
        prompts: what to continue.
        settings: from `greedy_settings`.
        sampling: the recipe's `verify.sampling`; None for greedy continuations alone.
        steps: counts continuations, or blocks.
        kept: what other artifacts' measurements have left of the reference, and this one's leaves.
    """

    prompts: EncodedPrompts
    settings: GenerationConfig
    sampling: SamplingSettings | None
    steps: Steps
    kept: Kept = NOTHING_KEPT

    @property
    def limit(self) -> int:
        """The most new tokens of a continuation."""
        assert isinstance(self.settings.max_new_tokens, int)
        return self.settings.max_new_tokens

    @property
    def samples(self) -> range:
        """The numbers of the samples of each prompt."""
        return range(self.sampling.samples if self.sampling else 0)

    def batches(self, *, padded: bool) -> list[PromptBatch]:
        """The prompts, for a whole model."""
        fill = self.settings.pad_token_id
        assert isinstance(fill, int)
        return batch_prompts(self.prompts.input_ids, new_tokens=self.limit, padded=padded, fill=fill)

    def texts(self) -> list[Text]:
        """One for each continuation, with a meaningless guess."""
        return [
            Text(index, sample, ids, [0] * self.limit)
            for sample in (None, *self.samples)
            for index, ids in enumerate(self.prompts.input_ids)
        ]

    def as_dict(self) -> dict[str, Any]:
        """All that decides a model's continuations, as JSON values."""
        return {
            "ids": [prompt.id for prompt in self.prompts.prompts],
            "tokens": [list(ids) for ids in self.prompts.input_ids],
            "settings": self.settings.to_dict(),
            "sampling": self.sampling.model_dump(mode="json") if self.sampling else None,
        }

    def noise(self, sample: int | None, indices: Sequence[int], begins: Sequence[int] | None) -> LogitsProcessorList:
        """What `sampling_noise` gives for some prompts; nothing for the greedy continuations."""
        if self.sampling is None or sample is None:
            return LogitsProcessorList()
        return sampling_noise(self.sampling, [self.prompts.prompts[index].id for index in indices], sample, begins)

    def noise_of(self, texts: Sequence[Text]) -> LogitsProcessorList:
        """The same for texts of one sample, some of whose tokens are known."""
        return self.noise(texts[0].sample, [text.prompt for text in texts], [len(text.tokens) for text in texts])


@dataclass(frozen=True)
class Continued:
    """One model's continuations, in the order of the prompts.

    Attributes:
        greedy: the likeliest tokens.
        samples: for each sample, those of all prompts.
    """

    greedy: list[Continuation]
    samples: list[list[Continuation]]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for `of`."""
        return {
            "greedy": [asdict(each) for each in self.greedy],
            "samples": [[asdict(each) for each in sample] for sample in self.samples],
        }

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Continued:
        """From the values that `as_dict` gave."""
        return cls(_continuations(found["greedy"]), [_continuations(sample) for sample in found["samples"]])


def _continuations(found: Sequence[Mapping[str, Any]]) -> list[Continuation]:
    return [Continuation(tuple(each["tokens"]), tuple(each["margins"])) for each in found]


@dataclass(frozen=True)
class Passes:
    """How continuations were found block by block.

    Attributes:
        drafted: whether the artifact was in memory as a whole and drafted; else each pass guessed for the next.
        reference: how often the reference's blocks were read.
        artifact: how often the artifact's were; None for a graph, which has no blocks and ran as a whole.
    """

    drafted: bool
    reference: int
    artifact: int | None


@dataclass(frozen=True)
class Both:
    """What both models made of the prompts.

    Attributes:
        reference: the merged model's continuations.
        artifact: the artifact's.
        tops: for each prompt, the artifact's likeliest token at each position of the reference's greedy continuation.
        padding: of the batches that went through whole models.
        passes: None if both models were in memory as a whole.
    """

    reference: Continued
    artifact: Continued
    tops: Sequence[Sequence[int]]
    padding: Padding
    passes: Passes | None = None


def continue_whole(reference: Openable, artifact: Openable, task: Task) -> Both:
    """Continues every prompt with one model, then with the other. Only one of them is in memory at a time.

    Both continue the same batches, so equal models give equal texts. Compared with continuing the prompts one by one,
    batches sum in another order, and the rounding can decide between tokens that are nearly equally likely.
    """
    own, padding = _reference_whole(reference, task)
    batches = task.batches(padded=padding.allowed)
    with artifact.whole() as model:
        return Both(own, _continue(model, batches, task), likeliest_along(model, batches, own.greedy), padding)


def _reference_whole(reference: Openable, task: Task) -> tuple[Continued, Padding]:
    """The reference's continuations, and whether prompts of different lengths may share a batch."""
    key = task.as_dict()
    if (known := task.kept.value("continuations", key)) is not None:
        return Continued.of(known["continued"]), Padding(**known["padding"])
    with reference.whole() as model:
        padding = check_padding(model, task.batches(padded=True), task.settings)
        own = _continue(model, task.batches(padded=padding.allowed), task)
    task.kept.keep_value("continuations", key, {"continued": own.as_dict(), "padding": asdict(padding)})
    return own, padding


def _continue(model: PreTrainedModel, batches: Sequence[PromptBatch], task: Task) -> Continued:
    task.steps.expect((1 + len(task.samples)) * len(task.prompts.prompts))

    def continued(sample: int | None) -> list[Continuation]:
        noise = partial(task.noise, sample, begins=None)
        return continue_all(model, batches, task.settings, lambda: task.steps.finished("continuing the prompts"), noise)

    return Continued(continued(None), [continued(sample) for sample in task.samples])


def continue_by_blocks(reference: BlockRunner, artifact: Openable, drafter: OpenModel | None, task: Task) -> Both:
    """Continues every prompt with the memory of one block, and of the drafter.

    Both models' texts come from passes over their blocks, see `decode`, in the same batches: equal models give equal
    texts. The artifact's first guess is the reference's text, along which its choices are recorded.

    Args:
        reference: the merged model.
        artifact: the artifact; a graph, which has no blocks, runs as a whole after the reference has ended.
        drafter: opens the artifact as it is stored; None if it does not fit in memory.
        task: what to continue.
    """
    if not isinstance(artifact, BlockRunner):
        return _beside_graph(reference, artifact, drafter, task)
    with _drafting(drafter, reference, task) as draft:
        own, passes = _reference_texts(reference, draft, task)
        other, found = task.texts(), _continued(own, task)
        for text, known in zip(other, own, strict=True):
            text.guess_next(known.tokens)
        own_passes = decode(artifact, other, task.settings, task.noise_of, draft, task.steps, "artifact")
    tops = [text.along[: len(known.tokens)] for text, known in zip(other, found.greedy, strict=False)]
    counts = Passes(drafter is not None, passes, own_passes)
    return Both(found, _continued(other, task), tops, Padding(allowed=True, kl=None), counts)


def _beside_graph(reference: BlockRunner, graph: Openable, drafter: OpenModel | None, task: Task) -> Both:
    found, passes = _by_blocks(reference, drafter, task)
    with graph.whole() as model:
        padding = check_padding(model, task.batches(padded=True), task.settings)
        batches = task.batches(padded=padding.allowed)
        other, tops = _continue(model, batches, task), likeliest_along(model, batches, found.greedy)
    return Both(found, other, tops, padding, Passes(drafter is not None, passes, None))


def _by_blocks(reference: BlockRunner, drafter: OpenModel | None, task: Task) -> tuple[Continued, int]:
    """A function of its own: nothing refers to the drafter after it."""
    with _drafting(drafter, reference, task) as draft:
        texts, passes = _reference_texts(reference, draft, task)
    return _continued(texts, task), passes


def _reference_texts(reference: BlockRunner, draft: Draft, task: Task) -> tuple[list[Text], int]:
    texts = task.texts()
    draft(texts)
    return texts, decode(reference, texts, task.settings, task.noise_of, draft, task.steps, "reference")


@contextmanager
def _drafting(drafter: OpenModel | None, reference: BlockRunner, task: Task) -> Iterator[Draft]:
    if drafter is None:
        yield keep_guesses
        return
    with drafter() as model:
        yield Drafter(model, reference.structure.positions, task.settings, task.noise_of)


def _continued(texts: Sequence[Text], task: Task) -> Continued:
    """In the order of `Task.texts`."""
    count = len(task.prompts.prompts)
    greedy, *samples = (
        [text.continuation for text in texts[first : first + count]] for first in range(0, len(texts), count)
    )
    return Continued(greedy, samples)


@contextmanager
def as_stored(artifact: StoredModel, dtype: torch.dtype, device: torch.device) -> Iterator[PreTrainedModel]:
    """The artifact in memory as it is stored, with its codes; its head computes in float32 if it is unquantized."""
    model = artifact.model(device=device, dtype=dtype)
    model.generation_config = GenerationConfig()  # no penalties
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    with in_float32(head) if head._parameters.get("weight") is not None else nullcontext():
        yield model
