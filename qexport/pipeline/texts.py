"""The texts of a run as tokens: calibration, held-out text, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError, listed
from qexport.loading.small_files import open_tokenizer
from qexport.pipeline.baseline import read_baseline, refuse_other_text
from qexport.pipeline.decidable import refuse_undecidable
from qexport.progress import Notice, ProgressCallback, silent
from qexport.quantizing.method import CalibrationSettings
from qexport.recipe import Recipe
from qexport.tensors import CalibrationSet
from qexport.text.documents import Documents, read_documents, refuse_shared
from qexport.text.formats import read_format_prompts
from qexport.text.preflight import TokenizerFolder, refuse_contradicting_ends
from qexport.text.prompts import EncodedPrompts, encode_prompts, read_prompts, refuse_long
from qexport.text.refusals import read_requests
from qexport.text.windows import HeldOut, make_held_out, make_windows
from qexport.verifying import VerifySettings
from qexport.verifying.document_sums import Baseline
from qexport.verifying.suites import NO_SUITES, Suites, read_suites
from qexport.verifying.tasks.measuring import require_harness
from qexport.verifying.tasks.planned import planned_tasks


@dataclass(frozen=True)
class Evaluation:
    """The texts that an artifact is verified on.

    Attributes:
        held_out: windows, as many as verification may take.
        prompts: prompts to continue, or None.
        suites: what else the models are asked.
        baseline: the release that the artifact is compared with, or None.
    """

    held_out: HeldOut
    prompts: EncodedPrompts | None
    suites: Suites = NO_SUITES
    baseline: Baseline | None = None


@dataclass(frozen=True)
class Texts:
    """The texts for the method and for verification.

    Attributes:
        calibration: windows for the method; None if it uses no text.
        evaluation: texts for verification; None if the recipe has no `verify`.
    """

    calibration: CalibrationSet | None
    evaluation: Evaluation | None


def read_texts(
    recipe: Recipe, checkpoint: Checkpoint, structure: Structure, *, progress: ProgressCallback = silent
) -> Texts:
    """Reads every text that the recipe names. The tokenizer, tens of megabytes, is not kept.

    Raises:
        InputError: a file cannot be read or holds too little text, or the held-out text is in the calibration set,
            or a prompt is longer than the model's positions, or the model's own files do not agree on what ends a text.
    """
    documents, calibration = None, None
    tokenizer = open_tokenizer(checkpoint)
    if (settings := recipe.quantize.calibration_settings) is not None:
        documents = _calibration_documents(settings)
        calibration = _calibration_windows(documents, settings, tokenizer, structure.vocab_size)
    if recipe.verify is None:
        return Texts(calibration, None)
    refuse_contradicting_ends(TokenizerFolder(tokenizer, checkpoint.files, checkpoint.config))
    evaluation = read_evaluation(recipe.verify, tokenizer, checkpoint, calibration=documents, progress=progress)
    return Texts(calibration, evaluation)


def read_evaluation(
    settings: VerifySettings,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    *,
    calibration: Documents | None = None,
    progress: ProgressCallback = silent,
) -> Evaluation:
    """Reads the held-out text and the prompts.

    Args:
        settings: the recipe's `verify`.
        tokenizer: the model's.
        checkpoint: the model.
        calibration: text that the held-out text must not share documents with.
        progress: is called with prompts that cannot be continued, and with windows that are not measured.

    Raises:
        InputError: a file cannot be read or holds too little text, or shares documents with the calibration text; or
            the baseline was measured on other text.
        RecipeError: the text cannot decide a limit on it, whatever is measured.
    """
    baseline, structure = read_baseline(settings), checkpoint.architecture.structure
    documents = read_documents(_listed(settings.text), field=settings.field)
    if baseline is not None:
        refuse_other_text(baseline, settings, documents.sha256, checkpoint.files)
    if settings.windows > settings.max_windows:
        progress(Notice(f"verify.windows is {settings.windows}, but max_windows limits it to {settings.max_windows}"))
    if calibration is not None:
        refuse_shared(calibration, documents)
    prompts = None
    if settings.prompts:
        prompts = encode_prompts(read_prompts(Path(settings.prompts)), tokenizer)
        for prompt, reason in prompts.skipped.items():
            progress(Notice(f"the prompt {prompt} is not continued: {reason}"))
        refuse_long(prompts, structure.positions, settings.max_new_tokens)
    held_out = make_held_out(
        documents,
        tokenizer,
        windows=settings.max_windows,
        sequence_length=settings.sequence_length,
        vocab_size=structure.vocab_size,
    )
    refuse_undecidable(settings, held_out, baseline)
    suites = read_suites(settings, documents, tokenizer, structure, progress)
    return Evaluation(held_out, prompts, suites, baseline)


def check_small_files(settings: VerifySettings) -> None:
    """Reads prompts, task files and the baseline's report, so that errors in them are found before any work.

    Raises:
        RecipeError: there are tasks, and lm-evaluation-harness is missing or too old, or a task has too few items for
            the margin; or there are limits on differences from a baseline, and there is none.
        InputError: a file cannot be read or is malformed.
    """
    read_baseline(settings)
    if settings.prompts:
        read_prompts(Path(settings.prompts))
    if settings.formats is not None:
        read_format_prompts(Path(settings.formats.prompts))
    if settings.refusals is not None:
        read_requests(Path(settings.refusals.prompts))
    if settings.tasks is not None:
        require_harness()
        planned_tasks(settings.tasks)


def refuse_long_windows(lengths: Mapping[str, int], structure: Structure) -> None:
    """Refuses windows that are longer than the number of positions that the model has learned.

    Args:
        lengths: window lengths, by the name of their setting.
        structure: the model's.

    Raises:
        CompatibilityError: a window is longer.
    """
    longest = structure.positions
    too_long = [f"{key}: {length}" for key, length in lengths.items() if longest is not None and length > longest]
    if too_long:
        raise CompatibilityError(
            f"the model has learned {longest} positions, and windows are longer",
            where=listed(too_long),
            mend=f"set sequence_length to {longest} or less",
        )


def _calibration_documents(settings: CalibrationSettings) -> Documents:
    return read_documents(
        _listed(settings.source), field=settings.field, split=settings.split, revision=settings.revision
    )


def _calibration_windows(
    documents: Documents, settings: CalibrationSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> CalibrationSet:
    return make_windows(
        documents,
        tokenizer,
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        vocab_size=vocab_size,
        packing=settings.packing,
        seed=settings.seed,
        chat_template=settings.chat_template,
    )


def _listed(source: str | list[str]) -> list[str]:
    return [source] if isinstance(source, str) else source
