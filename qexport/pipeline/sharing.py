"""What the runs of a sweep have in common: the measurements of the reference, in files of the sweep's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from qexport.artifact.digests import sha256_json
from qexport.pipeline.planning import Plan
from qexport.pipeline.resuming import inputs_of, of_environment, stamps_of
from qexport.pipeline.texts import Evaluation
from qexport.verifying.kept import NOTHING_KEPT, Kept

_DIGITS: Final = 16


@dataclass(frozen=True)
class SharedWork:
    """What several runs with the same base, adapter, merge and verification have in common.

    Attributes:
        folder: for the files; None if nothing is shared.
        ends_early: whether an artifact is not measured further once one of its gates has failed.
    """

    folder: Path | None = None
    ends_early: bool = False

    def of_reference(self, planned: Plan, evaluation: Evaluation, device: torch.device) -> Kept:
        """The measurements of a run's reference: none of those that were made of another.

        Args:
            planned: the run's plan.
            evaluation: its texts.
            device: where it computes.
        """
        if self.folder is None:
            return NOTHING_KEPT
        return Kept(self.folder / sha256_json(_of_reference(planned, evaluation, device))[:_DIGITS])


NOTHING_SHARED: Final = SharedWork()


def _of_reference(planned: Plan, evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
    """All that decides what is computed of a reference, apart from the text's windows and the prompts, by which results
    are kept. The base's files count as others when their times change.
    """
    recipe = planned.recipe.portable()
    return {
        **of_environment(device),
        "recipe": {part: recipe[part] for part in ("load", "merge")},
        "inputs": inputs_of(planned, evaluation),
        "files": stamps_of(planned.merged.checkpoint.origin.sha256),
    }


def shared_bytes(planned: Plan) -> int:
    """Bytes that the measurements of a run's reference take on the disk, at most.

    Most are the hidden states after each block, of the windows before the first look at the gates.
    """
    settings, structure = planned.recipe.verify, planned.structure
    if settings is None:
        return 0
    config = planned.merged.checkpoint.architecture.parsed.get_text_config()
    size: int = getattr(torch, planned.recipe.merge.dtype).itemsize
    of_window: int = settings.sequence_length * config.hidden_size * size
    first = min(settings.windows, settings.max_windows)
    states = of_window * (first * len(structure.blocks) + 2 * settings.max_windows)
    inputs = _INPUT_TOKENS * size * sum(linear.in_features for linear in structure.block_linears if not linear.expert)
    return states + inputs + _OTHERS * settings.max_windows * settings.sequence_length


_INPUT_TOKENS: Final = 256
"""Tokens of which the inputs of each layer are kept."""

_OTHERS: Final = 400
"""Bytes for each token: its figures under each rival."""
