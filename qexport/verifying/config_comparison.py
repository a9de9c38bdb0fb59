"""Whether an artifact's config.json describes the same model as its reference's.

Layouts write for runtimes with other versions of transformers: they write defaults out, and repeat under older keys
what transformers 5 has moved. Each key that they add must follow from the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ctypes import c_float
from typing import Any, Final

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.architecture import Architecture
from qexport.architectures.families import older_keys
from qexport.errors import InputError, listed

_MAY_DIFFER: Final = frozenset({"dtype", "torch_dtype", "_name_or_path"})
"""What may differ: the dtype of the unquantized weights, and the name, on which no model depends."""

_ABSENT: Final = object()


def refuse_other_config(reference: Architecture, artifact: Mapping[str, Any]) -> None:
    """Compares two contents of config.json. The artifact's file may be from an unknown author: a key that it adds could
    load code, or mean something to a server that it does not mean to transformers.

    Args:
        reference: the merged model's.
        artifact: the artifact's, without its `quantization_config`.

    Raises:
        InputError: a key is missing, has another value, or is new and does not follow from the reference.
    """
    if problems := config_differences(reference, artifact):
        raise InputError(
            "the artifact's config.json is not the reference's",
            where=f"config.json: {listed(problems)}",
            mend="verify the artifact against the model that it was made from",
        )


def config_differences(reference: Architecture, artifact: Mapping[str, Any]) -> list[str]:
    """Each key that describes another model, with its value and the expected one; see `refuse_other_config`."""
    ours = _plain(reference.config)
    expected = _implied(ours, reference.parsed)
    problems = []
    for key in sorted(ours.keys() | artifact.keys()):
        found, wanted = artifact.get(key, _ABSENT), expected.get(key, ours.get(key, _ABSENT))
        if key not in _MAY_DIFFER and _single(found) not in (_single(wanted), _single(ours.get(key, wanted))):
            problems.append(f"{key}{_difference(found, wanted)}")
    return problems


def _single(value: Any) -> Any:
    """With every float in single precision, in which models use them and the header of a GGUF file has them."""
    if isinstance(value, dict):
        return {key: _single(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_single(each) for each in value]
    return c_float(value).value if isinstance(value, float) else value


def _difference(found: Any, wanted: Any) -> str:
    if found is _ABSENT:
        return " is missing"
    return f" is {found!r:.80}, " + ("and must not be there" if wanted is _ABSENT else f"not {wanted!r:.80}")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON."""
    values: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return values


def _implied(config: Mapping[str, Any], read: PretrainedConfig) -> dict[str, Any]:
    """The value that a key must have if an artifact adds it: every value that transformers derives from the config, and
    the older keys from which other runtimes read it.
    """
    parsed = _plain(read.to_dict())
    values = {key: value for key, value in parsed.items() if key not in config}
    values |= {"partial_rotary_factor": 1.0} | older_keys(parsed)
    if not config.get("architectures"):
        values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(parsed["model_type"])]
    return values
