"""Hostile files and recipes end with the contract's exit code and one message, within seconds and a gigabyte, publish
nothing and run no code of theirs.

`make test` runs every sixteenth case, `make test-hostile` all of them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pytest

import forked
import qexport
import world
from cases import Case
from qexport.cli.app import failure_of
from spoiled_adapters import adapters
from spoiled_artifacts import artifacts
from spoiled_bases import bases
from spoiled_gguf import gguf_files
from spoiled_graphs import graphs
from spoiled_recipes import recipes
from spoiled_texts import texts
from spoiled_tokenizers import templates, tokenizers

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the library's threads

AREAS: dict[str, Callable[[], Iterator[Case]]] = {
    "recipes": recipes,
    "bases": bases,
    "adapters": adapters,
    "tokenizers": tokenizers,
    "templates": templates,
    "gguf": gguf_files,
    "texts": texts,
    "artifacts": artifacts,
    "graphs": graphs,
}
EVERY = int(os.environ.get("QEXPORT_HOSTILE_EVERY", "16"))
NUMBERS = count()


@cache
def cases_of(area: str) -> list[Case]:
    """Made when they are wanted: some are headers of a hundred thousand tensors."""
    return [*AREAS[area]()]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make(tmp_path_factory.mktemp("sound"))


def load(folder: str) -> int:
    """`qexport.load` with the command line's exit codes."""
    try:
        qexport.load(folder, device="cpu")
    except Exception as error:
        failure = failure_of(error)
        failure.show(as_json=False)
        return failure.exit_code
    return 0


def found_faults(case: Case, sound: Path, folder: Path) -> list[str]:
    shutil.copytree(sound, folder)
    case.spoil(folder)
    sys.path.insert(0, str(folder))  # packages named by a recipe
    try:
        as_json = case.command[0] != "load"
        if as_json:
            found = forked.forked([*case.command, "--json"], folder)
        else:
            found = forked.fork(lambda: load(case.command[1]), folder)
    finally:
        sys.path.remove(str(folder))
    faults = forked.faults(found, case.code, case.says, folder, as_json=as_json)
    shutil.rmtree(folder, ignore_errors=True)
    return faults


@pytest.mark.parametrize("area", AREAS)
def test_hostile_input_is_refused_in_bounds(area: str, sound: Path, tmp_path: Path) -> None:
    problems = {}
    for case in cases_of(area)[::EVERY]:
        if faults := found_faults(case, sound, tmp_path / str(next(NUMBERS))):
            problems[case.name] = faults
    assert not problems, "\n\n".join(f"{name}: {fault}" for name, faults in problems.items() for fault in faults)


def test_there_are_many_and_each_has_its_own_name() -> None:
    cases = [cases_of(area) for area in AREAS]
    assert sum(map(len, cases)) >= 300
    assert all(len({case.name for case in own}) == len(own) for own in cases)
