"""Whether every loader reads the same model from a finished folder."""

from __future__ import annotations

from qexport.artifact.stray_files import refuse_stray_files
from qexport.errors import InputError, listed
from qexport.formats.gptq.second_config import CONFIG_FILE, second_config_differences
from qexport.reading.stored_model import StoredModel
from qexport.tensors.safetensors_index import INDEX_NAME
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object


def refuse_second_model(artifact: StoredModel) -> None:
    """Refuses a folder from which some loader would get another model than the one that is read here.

    Raises:
        InputError: it holds files that a loader would read beside the artifact, or quantize_config.json and config.json
            contradict each other; the error names all of them.
    """
    refuse_stray_files(artifact.folder, [*artifact.files, *([INDEX_NAME] if artifact.kind == "weights" else [])])
    path = contained_path(artifact.folder, CONFIG_FILE)
    if not path.is_file():
        return
    if found := second_config_differences(artifact.quantization, read_json_object(path, limit=CONFIG_BYTES)):
        raise InputError(
            f"{path.name} is not the quantization_config of config.json, and some loaders read the one, some the other",
            where=f"{path}: {listed(found)}",
            mend=f"fetch both files again, or remove {path.name}",
        )
