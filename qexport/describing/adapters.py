"""What a PEFT adapter is, and whether its folder says that it was trained on a quantized base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qexport.describing.beside import card_fields, json_file
from qexport.merge.training_evidence import training_evidence
from qexport.tensors.strict_files import CONFIG_BYTES

ADAPTER_CONFIG: Final = "adapter_config.json"

_MOST_TARGETS: Final = 50


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter.

    Attributes:
        kind: PEFT's type, for example `LORA`.
        base: the base that it names.
        revision: the base's revision that it names.
        rank: of the factors.
        alpha: the numerator of the scale.
        variants: DoRA and the like, patterns, biases, modules that are saved whole.
        targets: the modules that it changes: names, or one regular expression.
        quantized_base: what in the folder says that it was trained on a quantized base. It may have been so without any
            of it: PEFT notes nothing when the base was quantized while it was loaded.
    """

    kind: str
    base: str | None
    revision: str | None
    rank: int | None
    alpha: float | None
    variants: tuple[str, ...]
    targets: tuple[str, ...]
    quantized_base: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """The same for the terminal, with labels."""
        scale = "" if self.rank is None else f", rank {self.rank}, alpha {self.alpha}"
        yield "adapter", f"{self.kind}{scale}{''.join(f', {each}' for each in self.variants)}"
        yield "changes", ", ".join(self.targets) or "nothing that it names"
        yield "base", f"{self.base or 'it names none'}{f', revision {self.revision}' if self.revision else ''}"
        none = "nothing in the folder says that it was quantized in training, which PEFT does not always note"
        yield "trained on", f"a quantized base: {'; '.join(self.quantized_base)}" if self.quantized_base else none


def adapter_of(folder: Path) -> AdapterFacts:
    """The adapter in a folder.

    Raises:
        InputError: adapter_config.json is malformed.
    """
    config = json_file(folder, ADAPTER_CONFIG, limit=CONFIG_BYTES)
    targets = config.get("target_modules")
    named = [targets] if isinstance(targets, str) else sorted(map(str, targets)) if isinstance(targets, list) else []
    base = config.get("base_model_name_or_path")
    return AdapterFacts(
        kind=str(config.get("peft_type")),
        base=str(base) if base else card_fields(folder).get("base_model"),
        revision=str(config["revision"]) if config.get("revision") else None,
        rank=config["r"] if isinstance(config.get("r"), int) else None,
        alpha=config["lora_alpha"] if isinstance(config.get("lora_alpha"), int | float) else None,
        variants=tuple(_variants(config)),
        targets=tuple(named[:_MOST_TARGETS]),
        quantized_base=training_evidence(folder, config).words,
    )


def _variants(config: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (("use_dora", "DoRA"), ("use_rslora", "rank-stabilized"), ("use_qalora", "QA-LoRA")):
        if config.get(key):
            yield words
    if config.get("bias", "none") != "none":
        yield f"bias {config['bias']}"
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if value := config.get(key):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "set"
            yield f"{key} {shown}"
