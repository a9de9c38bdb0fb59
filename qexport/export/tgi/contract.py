"""Holding a folder against every rule that TGI's launcher, router and loader apply."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.errors import listed
from qexport.export.contract import Check
from qexport.export.tgi.folder import ServedFolder, read_folder
from qexport.export.tgi.rules import GENERAL_RULES, Rule
from qexport.export.tgi.weight_rules import WEIGHT_RULES

SERVER: Final = "TGI 3.3"
RULES: Final = (*GENERAL_RULES, *WEIGHT_RULES)


def check_folder(folder: Path) -> list[Check]:
    """One check for each of `RULES`, made from what lies on the disk: configs, and the headers of the weights.

    Rules that do not concern the folder (those of GPTQ, say, where nothing is quantized) pass.

    Args:
        folder: an artifact of any layout, or any folder that `save_pretrained` has written.
    """
    found = read_folder(folder)
    return [check_rule(rule, found) for rule in RULES]


def check_rule(rule: Rule, folder: ServedFolder) -> Check:
    """Holds a folder against one rule. Values of a kind that the rule cannot judge break it."""
    try:
        faults = list(rule.faults(folder))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        faults = [f"cannot be judged: {type(error).__name__}: {error}"]
    return Check(rule.name, rule.source, not faults, listed(faults, limit=3) if faults else "as demanded")
