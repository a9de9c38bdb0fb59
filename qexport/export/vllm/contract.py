"""Holding a folder against every rule that vLLM's configuration and loaders apply."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.errors import listed
from qexport.export.contract import Check
from qexport.export.vllm.architectures import VERSION
from qexport.export.vllm.folder import ServedFolder, read_folder
from qexport.export.vllm.rules import CONFIG_RULES, Rule
from qexport.export.vllm.weight_rules import WEIGHT_RULES

SERVER: Final = f"vLLM {VERSION}"
RULES: Final = (*CONFIG_RULES, *WEIGHT_RULES)


def check_folder(folder: Path) -> list[Check]:
    """One check for each of `RULES`, made from what lies on the disk: configs, and the headers of the weights.

    Rules that do not concern the folder (those of GPTQ, say, where nothing is quantized) pass.

    Args:
        folder: an artifact of any layout, or any folder that `save_pretrained` has written.
    """
    found = read_folder(folder)
    return [_check(rule, found) for rule in RULES]


def _check(rule: Rule, folder: ServedFolder) -> Check:
    """Holds a folder against one rule. Values of a kind that the rule cannot judge break it."""
    try:
        faults = list(rule.faults(folder))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        faults = [f"cannot be judged: {type(error).__name__}: {error}"]
    return Check(rule.name, rule.source, not faults, listed(faults, limit=3) if faults else "as demanded")
