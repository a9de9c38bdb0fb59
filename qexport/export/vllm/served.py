"""An artifact as vLLM finds it: the class that it takes for the model, and the arguments that launch files give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.export.launch import FOLDER
from qexport.export.served_layers import ServedLayers


@dataclass(frozen=True)
class ServedByVllm(ServedLayers):
    """An artifact as vLLM finds it; see `ServedLayers`."""

    @property
    def architecture(self) -> str:
        """The class that config.json names, or transformers' class for the family."""
        model_type = self.config.get("model_type", "")
        named = self.config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
        return str(named[0])

    @property
    def engine_arguments(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The `model.json` of the Triton repository, with its name; empty if there are no launch files."""
        names = [name for name in self.files if fnmatch(name, f"{FOLDER}/triton/*/1/model.json")]
        return [(name, self.json(name)) for name in names]
