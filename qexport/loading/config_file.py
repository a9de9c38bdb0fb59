"""config.json, read strictly and freed of what would load code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qexport.architectures.code_keys import without_code_keys
from qexport.errors import InputError
from qexport.progress import Notice, Reporter
from qexport.tensors.contained_path import contained_path
from qexport.tensors.strict_json import read_json_object

CONFIG_NAME: Final = "config.json"

_LIMIT: Final = 1 << 24


def read_config(folder: Path, *, trusted_root: Path | None, report: Reporter) -> dict[str, Any]:
    """The content of the folder's config.json without the keys that would load code.

    Args:
        folder: the model's folder.
        trusted_root: where symbolic links may lead; the folder itself where None.
        report: is told which keys were dropped.

    Raises:
        InputError: the file is missing, not a JSON object, has a key twice or no model_type, or describes weights that
            are quantized already.
    """
    path = contained_path(folder, CONFIG_NAME, root=trusted_root)
    if not path.is_file():
        raise _no_config(folder)
    raw = read_json_object(path, limit=_LIMIT)
    config, dropped = without_code_keys(_with_marked_floats(raw))
    if dropped:
        report(Notice(f"config.json: dropped {', '.join(dropped)}; nothing from a model folder is executed"))
    if not isinstance(config.get("model_type"), str):
        raise InputError("model_type must name the model's family", where=str(path), mend="fetch the model anew")
    _refuse_quantized(config, str(path))
    return config


def _with_marked_floats(value: Any) -> Any:
    """Infinities as transformers 5 writes them: the literals that older versions wrote are no JSON."""
    if isinstance(value, list):
        return [_with_marked_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_marked_floats(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        if part.get("quantization_config") or part.get("compression_config"):
            raise InputError(
                "the base is quantized already; merging an adapter into it, or quantizing it twice, ruins the model",
                where=f"{where}: quantization_config",
                mend="name the 16-bit model that it was made from",
            )


def _no_config(folder: Path) -> InputError:
    if (folder / "adapter_config.json").is_file():
        mend = "this folder holds an adapter: name it as load.adapter, and its base model as load.base"
    elif any(folder.glob("*.gguf")):
        mend = "GGUF files are read from installed packages only: pkg:package/file.gguf"
    else:
        mend = "name the folder that a transformers model was saved to"
    return InputError(f"the folder holds no {CONFIG_NAME}", where=str(folder), mend=mend)
