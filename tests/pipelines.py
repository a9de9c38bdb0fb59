"""The two pipelines of docs/ci.md, as GitHub and GitLab read them, and the commands of qexport in scripts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/ci.md"


def pipeline_texts() -> dict[str, str]:
    """The YAML of each, by the name of its service."""
    github, gitlab = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {"github": github, "gitlab": gitlab}


def pipelines() -> dict[str, Any]:
    return {name: YAML(typ="safe").load(text) for name, text in pipeline_texts().items()}


def scripts(node: object) -> list[str]:
    """Every `run` (GitHub) and every entry of a `script` (GitLab) in a pipeline."""
    if isinstance(node, list):
        return [script for each in node for script in scripts(each)]
    if not isinstance(node, dict):
        return []
    found = [node.get(key, []) for key in ("run", "before_script", "script", "after_script")]
    here = [script for each in found for script in ([each] if isinstance(each, str) else each)]
    return here + [script for each in node.values() for script in scripts(each)]


def commands(script: str) -> list[list[str]]:
    """The words of each command of qexport after its name. Variables stand as they are."""
    lines = re.findall(r"(?:^|\s)qexport ([^;|&\n]*)", script.replace("\\\n", " "))
    return [shlex.split(line, comments=True) for line in lines]
