"""Holding a folder against every rule that TGI's launcher, router and loader apply."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.export.contract import Check, check_rules
from qexport.export.tgi.folder import read_folder
from qexport.export.tgi.rules import GENERAL_RULES
from qexport.export.tgi.weight_rules import WEIGHT_RULES

SERVER: Final = "TGI 3.3"
RULES: Final = (*GENERAL_RULES, *WEIGHT_RULES)


def check_folder(folder: Path) -> list[Check]:
    """One check for each of `RULES`, made from what lies on the disk: configs, and the headers of the weights.

    Rules that do not concern the folder (those of GPTQ, say, where nothing is quantized) pass.

    Args:
        folder: an artifact of any layout, or any folder that `save_pretrained` has written.
    """
    return check_rules(RULES, read_folder(folder))
