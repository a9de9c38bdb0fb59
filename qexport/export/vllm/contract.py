"""Holding a folder against every rule that vLLM's configuration and loaders apply."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qexport.export.contract import Check, check_rules
from qexport.export.vllm.architectures import VERSION
from qexport.export.vllm.folder import read_folder
from qexport.export.vllm.rules import CONFIG_RULES
from qexport.export.vllm.weight_rules import WEIGHT_RULES

SERVER: Final = f"vLLM {VERSION}"
RULES: Final = (*CONFIG_RULES, *WEIGHT_RULES)


def check_folder(folder: Path) -> list[Check]:
    """One check for each of `RULES`, made from what lies on the disk: configs, and the headers of the weights.

    Rules that do not concern the folder (those of GPTQ, say, where nothing is quantized) pass.

    Args:
        folder: an artifact of any layout, or any folder that `save_pretrained` has written.
    """
    return check_rules(RULES, read_folder(folder))
