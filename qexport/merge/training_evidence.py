"""What in an adapter's folder says that its base was quantized in training. Imports neither torch nor transformers.

It may have been without any of it: PEFT notes nothing where the base was quantized while it was loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.errors import InputError
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_bounded, read_json_object

_QUANTIZED_NAME: Final = re.compile(
    r"(bnb-[48]bit|[-_]([2-8]bit|int[48]|fp8|nf4|gptq|awq|nvfp4|mxfp4|w\da\d+))(?![a-z0-9])", re.I
)
_IN_CARD: Final = re.compile(r"^- (_?load_in_[48]bit|quant_method|bnb_4bit_\w+): *(\w+)", re.MULTILINE)
"""The block that PEFT 0.4 and 0.5 write into the card of an adapter."""

_CARD: Final = "README.md"
_CARD_LIMIT: Final = 1 << 20
_MOST_OF_CARD: Final = 3


@dataclass(frozen=True)
class TrainingEvidence:
    """What a folder says of its training.

    Attributes:
        words: one for each sign of a quantized base.
        four_bit: whether one of them is a sign of bitsandbytes' 4 bits.
        settings: `merge.trained_on` for it, as far as the signs tell; what they leave open is as in QLoRA.
    """

    words: tuple[str, ...]
    four_bit: bool
    settings: str


def training_evidence(folder: Path, config: Mapping[str, Any]) -> TrainingEvidence:
    """The signs in an adapter's folder.

    Args:
        folder: the adapter's.
        config: the content of its adapter_config.json.
    """
    base = config.get("base_model_name_or_path")
    name = base if isinstance(base, str) else ""
    quantized, card = _config_of(name), _card(folder)
    words = tuple(_words(name, config, quantized, card))
    loads = [value.get("load_in_4bit") for value in (quantized, card)]
    four_bit = True in loads or "True" in loads or "bnb-4bit" in name.lower()
    return TrainingEvidence(words, four_bit, _settings({**quantized, **card}))


def _settings(found: Mapping[str, Any]) -> str:
    quant_type = "fp4" if found.get("bnb_4bit_quant_type") == "fp4" else "nf4"
    double_quant = str(found.get("bnb_4bit_use_double_quant", True)) != "False"
    return f"{{quant_type: {quant_type}, double_quant: {str(double_quant).lower()}}}"


def _words(
    name: str, config: Mapping[str, Any], quantized: Mapping[str, Any], card: Mapping[str, str]
) -> Iterator[str]:
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if found := _QUANTIZED_NAME.search(last):
        yield f"its base is named {last} ({found[0].strip('-_')})"
    if quantized:
        yield f"the base that it names is quantized with {quantized.get('quant_method', 'an unnamed method')}"
    if config.get("loftq_config"):
        yield "loftq_config is set"
    if config.get("use_qalora"):
        yield "QA-LoRA belongs to a quantized base"
    said = [
        (key, value) for key, value in card.items() if not key.startswith("bnb_") and value not in ("False", "None")
    ]
    for key, value in said[:_MOST_OF_CARD]:
        yield f"its card says {key}: {value}"


def _card(folder: Path) -> Mapping[str, str]:
    try:
        path = contained_path(folder, _CARD)
        text = read_bounded(path, _CARD_LIMIT).decode("utf-8", errors="replace") if path.is_file() else ""
    except (InputError, OSError):  # a card is no part of the adapter
        return {}
    return dict(_IN_CARD.findall(text))


def _config_of(name: str) -> Mapping[str, Any]:
    """The quantization_config of the base that an adapter names, if it lies on this machine: in a folder or in the
    hub's cache. Nothing is fetched.
    """
    place = _config_path(name)
    if place is None:
        return {}
    try:
        found = read_json_object(place, limit=CONFIG_BYTES).get("quantization_config")
    except InputError:  # whoever loads that base is told
        return {}
    return found if isinstance(found, Mapping) else {}


def _config_path(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if name and (local := Path(name) / "config.json").is_file():
            return local
        cached = try_to_load_from_cache(name, "config.json")
    except (HFValidationError, OSError, ValueError):  # no name that a folder or a model of the hub can have
        return None
    return Path(cached) if isinstance(cached, str) else None
