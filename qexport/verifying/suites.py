"""The suites of a recipe: what both models are asked besides held-out text and prompts, since an average over text does
not show every fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.architectures.machine_memory import available_memory
from qexport.architectures.structure import Structure
from qexport.artifact.answers import Answers
from qexport.artifact.figures import Figure
from qexport.errors import InputError, listed
from qexport.progress import Notice, ProgressCallback, Steps
from qexport.text.documents import Documents
from qexport.text.formats import FormatPrompts, read_format_prompts
from qexport.text.needles import Needles, make_needles
from qexport.text.prompts import EncodedPrompts, PromptSet, encode_prompts, refuse_long
from qexport.text.refusals import Requests, read_requests
from qexport.text.windows import TooLittleText, make_windows
from qexport.verifying import FormatSettings, RefusalSettings, VerifySettings
from qexport.verifying.answers import MeasuredAnswers
from qexport.verifying.formats import measure_formats
from qexport.verifying.lengths import measure_drift, measure_recall
from qexport.verifying.memory import cache_memory, choose_way
from qexport.verifying.refusals import measure_refusals
from qexport.verifying.whole_models import Pair


@dataclass(frozen=True)
class FormatSuite:
    """Prompts whose answers must have a form.

    Attributes:
        prompts: all of them.
        encoded: those that the model can continue.
        max_new_tokens: tokens of an answer, at most.
    """

    prompts: FormatPrompts
    encoded: EncodedPrompts
    max_new_tokens: int


@dataclass(frozen=True)
class RefusalSuite:
    """Requests that are refused or not.

    Attributes:
        requests: all of them.
        encoded: those that the model can answer.
        max_new_tokens: tokens of an answer, at most.
    """

    requests: Requests
    encoded: EncodedPrompts
    max_new_tokens: int


@dataclass(frozen=True)
class LengthSuite:
    """Windows and texts of several lengths.

    Attributes:
        windows: by their length, int64 [windows, length].
        needles: texts with a fact; None for none.
        left_out: for users, which lengths were left out, and why.
    """

    windows: Mapping[int, Tensor]
    needles: Needles | None
    left_out: Sequence[str]


@dataclass(frozen=True)
class Suites:
    """The suites of a recipe, as the model sees them; None for one that it does not name."""

    formats: FormatSuite | None = None
    refusals: RefusalSuite | None = None
    lengths: LengthSuite | None = None


NO_SUITES: Final = Suites()


def read_suites(
    settings: VerifySettings,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    structure: Structure,
    progress: ProgressCallback,
) -> Suites:
    """Reads and encodes what the suites name.

    Args:
        settings: the recipe's `verify`.
        documents: the held-out text, from which windows of other lengths are cut.
        tokenizer: the model's.
        structure: the model's.
        progress: is called with prompts that cannot be continued.

    Raises:
        InputError: a file cannot be read or is malformed, prompts are longer than the model's positions, or no length
            fits the model and the text.
    """
    encoder = _Encoder(tokenizer, structure, progress)
    return Suites(
        _formats(settings.formats, encoder) if settings.formats else None,
        _refusals(settings.refusals, encoder) if settings.refusals else None,
        _lengths(settings.lengths, settings, documents, encoder) if settings.lengths else None,
    )


@dataclass(frozen=True)
class _Encoder:
    tokenizer: PreTrainedTokenizerBase
    structure: Structure
    progress: ProgressCallback

    def __call__(
        self, prompts: PromptSet, name: str, max_new_tokens: int, tools: Mapping[str, Any] = {}
    ) -> EncodedPrompts:
        encoded = encode_prompts(prompts, self.tokenizer, tools)
        _notify_skipped(encoded.skipped, self.progress)
        refuse_long(encoded, self.structure.positions, max_new_tokens, f"verify.{name}.max_new_tokens")
        return encoded


def _formats(settings: FormatSettings, encoder: _Encoder) -> FormatSuite:
    prompts, most = read_format_prompts(Path(settings.prompts)), settings.max_new_tokens
    return FormatSuite(prompts, encoder(prompts.prompt_set, "formats", most, prompts.tools), most)


def _refusals(settings: RefusalSettings, encoder: _Encoder) -> RefusalSuite:
    requests, most = read_requests(Path(settings.prompts)), settings.max_new_tokens
    return RefusalSuite(requests, encoder(requests.prompt_set, "refusals", most), most)


def _lengths(lengths: Sequence[int], settings: VerifySettings, documents: Documents, encoder: _Encoder) -> LengthSuite:
    context, left_out = encoder.structure.context, list[str]()
    windows: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        if context is not None and length > context:
            left_out.append(f"length {length} left out: the model has {context} positions")
            continue
        try:
            windows[length] = _windows(length, settings.length_windows, documents, encoder)
        except TooLittleText as error:
            left_out.append(f"length {length} left out: {error.what}")
            continue
        if len(windows[length]) < settings.length_windows:
            left_out.append(f"length {length}: the text has only {len(windows[length])} windows")
    if not windows:
        raise InputError(
            f"no length of verify.lengths can be measured: {listed(left_out)}",
            where=documents.origin,
            mend="name shorter lengths, or give more held-out text",
        )
    for reason in left_out:
        encoder.progress(Notice(reason))
    needles = make_needles(encoder.tokenizer, list(windows), settings.needles) if settings.needles else None
    return LengthSuite(windows, needles, left_out)


def _windows(length: int, count: int, documents: Documents, encoder: _Encoder) -> Tensor:
    """Documents of all domains in one order, joined: few documents are as long as long windows."""
    return make_windows(
        documents,
        encoder.tokenizer,
        samples=count,
        sequence_length=length,
        vocab_size=encoder.structure.vocab_size,
        seed=0,
        allow_fewer=True,
    ).input_ids


def _notify_skipped(skipped: Mapping[str, str], progress: ProgressCallback) -> None:
    reasons: dict[str, list[str]] = {}
    for prompt, reason in skipped.items():
        reasons.setdefault(reason, []).append(prompt)
    for reason, prompts in reasons.items():
        progress(Notice(f"not continued: {', '.join(prompts)}: {reason}"))


@dataclass
class MeasuredSuites:
    """What was measured.

    Attributes:
        figures: of all suites.
        formats: None if it was not measured.
        refusals: likewise.
        needles: likewise.
        notes: for users.
    """

    figures: list[Figure] = field(default_factory=list)
    formats: Answers | None = None
    refusals: Answers | None = None
    needles: Answers | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, measured: MeasuredAnswers, figures: Sequence[Figure]) -> Answers:
        """Adds a suite's figures and notes, and returns its answers."""
        self.figures += figures
        self.notes += [f"{name}: {note}" for note in measured.notes]
        return measured.record


def measure_suites(pair: Pair, suites: Suites, steps: Steps) -> MeasuredSuites:
    """Asks both models.

    Args:
        pair: the models.
        suites: what to ask.
        steps: counts the steps.

    Raises:
        NumericalError: logits hold NaN or Inf.
    """
    found = MeasuredSuites()
    available = available_memory(pair.reference.device)
    way = choose_way(pair.reference, pair.stored, available)
    if (formats := suites.formats) is not None:
        asked, limit = (formats.prompts, formats.encoded), formats.max_new_tokens
        found.formats = found.add("formats", *measure_formats(pair, *asked, way, steps, max_new_tokens=limit))
    if (refusals := suites.refusals) is not None:
        asked_for, limit = (refusals.requests, refusals.encoded), refusals.max_new_tokens
        found.refusals = found.add("refusals", *measure_refusals(pair, *asked_for, way, steps, max_new_tokens=limit))
    if (lengths := suites.lengths) is not None:
        found.notes += lengths.left_out
        found.figures += measure_drift(pair, lengths.windows, steps)
        if (needles := lengths.needles) is not None:
            spare = available - cache_memory(pair.reference, max(map(len, needles.encoded.input_ids)))
            way = choose_way(pair.reference, pair.stored, spare)
            found.needles = found.add("needles", *measure_recall(pair, needles, way, steps))
    return found
