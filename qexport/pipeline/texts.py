"""The texts of a run as tokens: calibration, held-out text, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qexport.architectures.structure import Structure
from qexport.loading.tokenizer import open_tokenizer
from qexport.quantize.settings import CalibrationSettings, GptqSettings
from qexport.recipe.model import Recipe
from qexport.tensors import CalibrationSet, Checkpoint
from qexport.text.documents import Documents, read_documents, refuse_shared
from qexport.text.prompts import EncodedPrompts, encode_prompts, read_prompts, refuse_long
from qexport.text.windows import make_windows
from qexport.verifying.settings import VerifySettings


@dataclass(frozen=True)
class Texts:
    """What the method looks at, and what it is judged by.

    Attributes:
        calibration: windows for the method; None where it looks at no text.
        held_out: windows for verification; None where the recipe has none.
        prompts: prompts to continue; None where the recipe has none.
    """

    calibration: CalibrationSet | None
    held_out: CalibrationSet | None
    prompts: EncodedPrompts | None


def read_texts(recipe: Recipe, checkpoint: Checkpoint, structure: Structure) -> Texts:
    """Reads every text that the recipe names. The tokenizer, tens of megabytes, is not kept.

    Raises:
        InputError: a file cannot be read or holds too little text, or the held-out text is in the calibration set,
            or a prompt is longer than the model's positions.
    """
    tokenizer, vocab_size = open_tokenizer(checkpoint), structure.vocab_size
    documents, calibration = None, None
    if isinstance(recipe.quantize, GptqSettings):
        documents = _calibration_documents(recipe.quantize.calibration)
        calibration = _calibration_windows(documents, recipe.quantize.calibration, tokenizer, vocab_size)
    if recipe.verify is None:
        return Texts(calibration, None, None)
    held_out = read_documents(_listed(recipe.verify.text), field=recipe.verify.field)
    if documents is not None:
        refuse_shared(documents, held_out)
    prompts = None
    if recipe.verify.prompts:
        prompts = encode_prompts(read_prompts(Path(recipe.verify.prompts)), tokenizer)
        refuse_long(prompts, structure.positions, recipe.verify.max_new_tokens)
    return Texts(calibration, _held_out_windows(held_out, recipe.verify, tokenizer, vocab_size), prompts)


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


def _held_out_windows(
    documents: Documents, settings: VerifySettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> CalibrationSet:
    return make_windows(
        documents,
        tokenizer,
        samples=settings.windows,
        sequence_length=settings.sequence_length,
        vocab_size=vocab_size,
        allow_fewer=True,
    )


def _listed(source: str | list[str]) -> list[str]:
    return [source] if isinstance(source, str) else source
