"""The gate `files`: what an artifact's files beside config.json and the weights say, against the reference's."""

from __future__ import annotations

from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import CheckResult
from qexport.reading.stored_model import StoredModel
from qexport.text.file_names import GENERATION_CONFIG
from qexport.text.preflight import TokenizerFolder
from qexport.text.tokenizer_files import compare_tokenizer_files
from qexport.text.tokenizers import json_object
from qexport.verifying.generation_config import GenerationSide, generation_differences


def check_files(
    reference: Checkpoint, artifact: StoredModel, base: TokenizerFolder, own: TokenizerFolder
) -> list[CheckResult]:
    """One check for generation_config.json, and one for each file of the tokenizer.

    Args:
        reference: the merged model.
        artifact: the artifact.
        base: the reference's tokenizer and files.
        own: the artifact's.

    Raises:
        InputError: a JSON file among the files is malformed.
    """
    sides = [
        GenerationSide(json_object(files, GENERATION_CONFIG) if GENERATION_CONFIG in files else None, parsed)
        for files, parsed in (
            (base.files, reference.architecture.parsed),
            (own.files, artifact.architecture.parsed),
        )
    ]
    problems = generation_differences(*sides)
    detail = "; ".join(problems) or "every key means what it means in the reference"
    generation = CheckResult(gate="files", name=GENERATION_CONFIG, passed=not problems, detail=detail)
    return [generation, *compare_tokenizer_files(base, own)]
