"""What an adapter's files say, put as PEFT writes it: keys with the adapter's name, targets that were never trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qexport.tensors.source import TensorSpec, WeightSource

PREFIX: Final = "base_model.model."
"""What PEFT writes before every module path."""

_NAME: Final = "default"
_NEVER_NAMED: Final = ("original_module", "base_layer")


@dataclass(frozen=True)
class Renamed:
    """A `WeightSource` with other names.

    Attributes:
        source: where the tensors are.
        names: the name in the source of each tensor.
    """

    source: WeightSource
    names: Mapping[str, str]

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource.specs`."""
        found = self.source.specs()
        return {name: found[stored] for name, stored in self.names.items()}

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource.read`."""
        return self.source.read(self.names[name])


def without_names(source: WeightSource) -> WeightSource:
    """The tensors of a model's own `state_dict`, where each key has the adapter's name `default`, as PEFT stores them.

    A file in which some factors are named and some are not is left as it is: it was not written in one piece.
    """
    keys = list(source.specs())
    plain = [
        key for key in keys if _NAME not in key.split(".") and not any(f".{part}." in key for part in _NEVER_NAMED)
    ]
    names = {_unnamed(key): key for key in keys}
    return source if plain or len(names) < len(keys) else Renamed(source, names)


def _unnamed(key: str) -> str:
    parts = key.split(".")
    if _NAME not in parts:
        return key
    index = len(parts) - 1 - parts[::-1].index(_NAME)
    saved = index > 0 and parts[index - 1] == "modules_to_save"
    return ".".join([*parts[: index - saved], *parts[index + 1 :]])


def trained_targets(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[list[str], list[str]] | None:
    """The names in `target_modules` of which the file has tensors, and those of which it has none.

    None if all or none of them have tensors, or if `target_modules` is a pattern.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        return None
    paths = [f".{key.removeprefix(PREFIX)}" for key in keys]
    trained = [target for target in targets if any(f".{target}." in path for path in paths)]
    untrained = [target for target in targets if target not in trained]
    return (trained, untrained) if trained and untrained else None
