"""YAML for launch files."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML


def yaml_text(*documents: Mapping[str, Any]) -> str:
    """The documents in block style, keys in their order, without anchors."""
    yaml, stream = YAML(), StringIO()
    yaml.width = 120
    yaml.representer.ignore_aliases = lambda data: True
    yaml.dump_all(documents, stream)
    return stream.getvalue()
