"""What a GGUF file is, from its header."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.artifact.digests import sha256_bytes
from qexport.describing.architecture import ArchitectureFacts
from qexport.describing.beside import Beside, LicenseFacts, TemplateFacts, TokenizerFacts
from qexport.describing.quantization import Quantization
from qexport.describing.tensors import StoredTensor, StoredTensors
from qexport.tensors.gguf_parts import open_gguf

_KEYS: Final = {
    "blocks": "block_count",
    "hidden": "embedding_length",
    "heads": "attention.head_count",
    "key_value_heads": "attention.head_count_kv",
    "context": "context_length",
    "experts": "expert_count",
}
_PLAIN: Final = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")


class GgufHeader:
    """The header of a GGUF file, or of the model in several files.

    Raises:
        InputError: the file is malformed.
    """

    def __init__(self, path: Path) -> None:
        file = open_gguf(path)
        file.close()
        self._metadata, self._lengths = file.metadata, file.array_lengths
        tensors = {
            name: StoredTensor(each.kind.name, each.shape, each.rows * each.row_bytes)
            for name, each in file.tensors.items()
        }
        self.weights = StoredTensors(tensors, {each.name: each.stat().st_size for each in file.paths})

    @property
    def architecture(self) -> ArchitectureFacts:
        """The model."""
        family = self._text("general.architecture")
        numbers = {field: self._number(f"{family}.{key}") for field, key in _KEYS.items()}
        embedding = self.weights.tensors.get("token_embd.weight")
        vocabulary = self._lengths.get("tokenizer.ggml.tokens") or (embedding.shape[0] if embedding else None)
        name = self._metadata.get("general.name")
        return ArchitectureFacts(family=family, name=str(name) if name else None, vocabulary=vocabulary, **numbers)

    @property
    def quantization(self) -> Quantization:
        """The quantized type of most bytes, None if there is none, and how many tensors have each type."""
        kinds = self.weights.by_dtype
        method = next((kind for kind in kinds if kind not in _PLAIN), None)
        counts = {kind: sum(each.dtype == kind for each in self.weights.tensors.values()) for kind in kinds}
        coded = sum(count for kind, count in counts.items() if kind not in _PLAIN)
        parameters = sum(each.values for each in self.weights.tensors.values())
        return Quantization(
            method, None, {f"tensors in {kind}": count for kind, count in counts.items()}, coded, parameters
        )

    @property
    def beside(self) -> Beside:
        """Tokenizer, template and license."""
        return Beside(self._tokenizer(), self._template(), LicenseFacts(self._text("general.license"), ()))

    def _tokenizer(self) -> TokenizerFacts | None:
        model = self._text("tokenizer.ggml.model")
        if model is None:
            return None
        pre = self._text("tokenizer.ggml.pre")
        kind = f"{model} ({pre})" if pre else model
        return TokenizerFacts(kind, self._lengths.get("tokenizer.ggml.tokens"), 0, {}, None)

    def _template(self) -> TemplateFacts | None:
        text = self._text("tokenizer.chat_template")
        if text is None:
            return None
        return TemplateFacts("tokenizer.chat_template", len(text), sha256_bytes(text.encode()))

    def _text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        return value if isinstance(value, str) else None

    def _number(self, key: str) -> int | None:
        value = self._metadata.get(key)
        return value if type(value) is int else None
