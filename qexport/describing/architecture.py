"""The architecture of a model as its config.json names it, without asking transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

_KEYS: Final = {
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}


@dataclass(frozen=True)
class ArchitectureFacts:
    """A model's architecture; None for what nothing names.

    Attributes:
        family: `model_type`, or GGUF's `general.architecture`.
        name: the class of transformers, or GGUF's `general.name`.
        blocks: decoder layers.
        hidden: width of the hidden states.
        heads: of attention.
        key_value_heads: for keys and values, where they are fewer.
        vocabulary: rows of the embedding.
        context: positions that the model was made for.
        experts: of each mixture.
    """

    family: str | None
    name: str | None = None
    blocks: int | None = None
    hidden: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    vocabulary: int | None = None
    context: int | None = None
    experts: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def words(self) -> str:
        """The same for the terminal."""
        parts = (
            ("blocks", self.blocks), ("hidden size", self.hidden), ("heads", self.heads),
            ("heads for keys and values", self.key_value_heads), ("tokens in the vocabulary", self.vocabulary),
            ("positions", self.context), ("experts", self.experts),
        )  # fmt: skip
        shown = [
            f"{words} {value}" if words == "hidden size" else f"{value} {words}" for words, value in parts if value
        ]
        return ", ".join([f"{self.family or 'of no named family'}{f' ({self.name})' if self.name else ''}", *shown])


def architecture_of(config: Mapping[str, Any]) -> ArchitectureFacts | None:
    """The architecture that a config.json describes; None if it names no family.

    Models of text and images have a part of their own for text, which is looked into too.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        return None
    inner = config.get("text_config")
    parts = [config, *([inner] if isinstance(inner, Mapping) else [])]
    numbers = {field: _first(parts, keys) for field, keys in _KEYS.items()}
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else None
    return ArchitectureFacts(family=family, name=name, **numbers)


def _first(parts: list[Mapping[str, Any]], keys: tuple[str, ...]) -> int | None:
    return next((part[key] for part in parts for key in keys if type(part.get(key)) is int), None)
