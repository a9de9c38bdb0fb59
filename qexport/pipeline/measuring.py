"""What the options of the method `mixed` cost, measured by `qexport plan --measure` and kept for the run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from qexport.architectures.devices import find_device
from qexport.architectures.memory import keeping_to
from qexport.artifact import describe_environment
from qexport.artifact.digests import hashed_in_background, sha256_json
from qexport.artifact.disk import make_folder
from qexport.artifact.journal import Journal
from qexport.errors import RecipeError
from qexport.execution import execution_of
from qexport.execution.workers import Execution
from qexport.hidden_packages import hidden
from qexport.pipeline.choice_space import ChoiceSpace
from qexport.pipeline.made_choice import MadeChoice
from qexport.pipeline.mixing import choose, measure_units
from qexport.pipeline.planning import Plan
from qexport.pipeline.resuming import digests_of, inputs_of
from qexport.pipeline.texts import read_texts
from qexport.progress import Notice, ProgressCallback, silent
from qexport.recipe import checked_output
from qexport.tensors import CalibrationSet

_SUFFIX: Final = ".measured"
_RECORD: Final = "losses"


@hidden("kernels")
def measured(planned: Plan, *, progress: ProgressCallback = silent) -> Plan:
    """The plan with the choice that a run will make. What was measured is kept beside the output, for the run and for
    plans with other targets.

    Args:
        planned: of a recipe with the method `mixed`.
        progress: is called with each step.

    Raises:
        RecipeError: it is another method, or the output is taken.
        CompatibilityError: the target is out of reach.
        ResourceError: there is not enough memory, or the disk is full.
    """
    recipe, device = planned.recipe, find_device("auto")
    texts = read_texts(recipe, planned.merged.checkpoint, planned.structure, progress=progress)
    if planned.space is None or texts.calibration is None:
        raise RecipeError(
            f"a plan measures what the method mixed chooses from, and this is {recipe.quantize.title}",
            where="--measure",
            mend="leave it out",
        )
    if device.type == "cpu":
        planned.expected.refuse_beyond(recipe.max_memory)
    output = checked_output(recipe, force=True)
    hashed = hashed_in_background(planned.merged.checkpoint.origin.sha256)
    with keeping_to(planned.expected.budget), execution_of(recipe.execution, device) as execution, hashed:
        losses = losses_of(
            planned, planned.space, texts.calibration, output, device, execution, keep=True, progress=progress
        )
    layout = planned.layouts[0]
    return planned.choosing(MadeChoice(planned.space, layout, choose(planned.space, layout, losses)))


def losses_of(
    planned: Plan,
    space: ChoiceSpace,
    calibration: CalibrationSet,
    output: Path,
    device: torch.device,
    execution: Execution,
    *,
    keep: bool = False,
    progress: ProgressCallback,
) -> list[list[float]]:
    """What each option of each unit costs, see `measure_units`: as it is kept, else measured.

    Args:
        planned: the plan.
        space: what may be chosen.
        calibration: the text to measure on.
        output: the run's output, beside which it may be kept.
        device: where to compute.
        execution: the workers.
        keep: whether to keep what is measured.
        progress: is called with each block.

    Raises:
        CompatibilityError: there is too little text.
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
        OSError: the disk is full or failed.
    """
    path = output.with_name(output.name + _SUFFIX)
    journal = Journal(path) if path.is_file() else None
    if journal is not None:
        identity = _identity(planned, space, calibration, device)
        for kept in journal.of_kind(_RECORD):
            if kept["identity"] == identity:
                progress(Notice(f"the effect of each layer is known from qexport plan --measure: {path.name}"))
                return list(kept["losses"])
    losses = measure_units(space, calibration, device=device, execution=execution, progress=progress)
    if keep:
        make_folder(path.parent)
        path.touch()
        identity = _identity(planned, space, calibration, device)
        Journal(path).append(_RECORD, {"identity": identity, "losses": losses})
    return losses


def _identity(planned: Plan, space: ChoiceSpace, calibration: CalibrationSet, device: torch.device) -> str:
    """The digest of all that decides what is measured; the target is none of it. Waits for the digests of the base."""
    recipe: dict[str, Any] = planned.recipe.portable()
    settings = {key: value for key, value in recipe["quantize"].items() if key != "target"}
    return sha256_json(
        {
            "qexport": version("qexport"),
            "environment": describe_environment(device).model_dump(mode="json"),
            "recipe": {"load": recipe["load"], "merge": recipe["merge"], "quantize": settings},
            "inputs": inputs_of(planned, None) | {"calibration": digests_of(calibration)},
            "weights": dict(planned.merged.checkpoint.origin.sha256),
            "options": [
                [linear.name, list(map(str, own))] for (linear, *_), own in zip(space.units, space.options, strict=True)
            ],
        }
    )
