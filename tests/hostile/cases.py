"""A hostile case: what is spoiled in a copy of the world, the command, its exit code, and words of its error."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from world import RECIPE, VERIFY, Spoil, write_recipe

PLAN = ("plan", "r.yaml")
RUN = ("run", "r.yaml")
GPTQ = ("run", "g.yaml")
INSPECT = ("validate", "artifact")
VERIFYING = ("verify", "artifact", "--reference", "v.yaml")
GATE = ("gate", "artifact", "--unchecked", "--gates", "gates.yaml")
REPORT = ("report", "artifact", "--unchecked")
LOAD = ("load", "artifact")
"""No command: `qexport.load`."""
GRAPHS = (("load", "graph"), ("verify", "graph", "--reference", "v.yaml"))


@dataclass(frozen=True)
class Case:
    """One spoiled copy of the world."""

    name: str
    spoil: Spoil
    command: Sequence[str]
    code: int
    says: str = ""


def recipe(**values: Any) -> Spoil:
    return lambda world: write_recipe(world / "r.yaml", RECIPE | values)


def verifying(**values: Any) -> Spoil:
    return recipe(verify=VERIFY | values)


class Fires:
    """What a pickle would call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("fired",)


PICKLE = pickle.dumps(Fires())
CODE = "from pathlib import Path\nPath('fired').mkdir()\n"
