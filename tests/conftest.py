"""What holds for every test."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Generator, Iterator, Set
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread, and lose much where other programs keep the cores busy. Tests that are
# about threads set their own number. OpenMP reads its variables once, when torch is imported. Threads without work are
# to sleep: another worker needs their core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

from fresh import Fresh

# Speed is measured in benchmarks/, not in tests: coverage and busy cores make single examples slow.
settings.register_profile("qexport", deadline=None)
settings.load_profile("qexport")

SLOW = Path(__file__).parent / "slow.txt"
"""What `make quick` leaves out, one a line: seconds or a reason, then a file or one of its functions. The lines with
seconds are those whose cases take more than `LIMIT` seconds of processor time together; `pytest --measure-slow` writes
them anew and leaves the others."""

LIMIT = 0.25


PROCESSES = {"harness", "peaks"}
"""Fixtures of a file for which a process is started that imports torch."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure-slow", action="store_true", help="write the seconds in tests/slow.txt anew")


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to workers imports no torch, which takes seconds before they start."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        import torch

        import disk_cache

        torch.set_num_threads(1)
        disk_cache.start()  # before the tests import qexport
    if config.getoption("--measure-slow"):
        config.pluginmanager.register(Measure())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The only place where tests are marked as slow. Those of the real model come first: their fixtures take up to half
    a minute and are then made in one worker, since what another takes over lies at the end of its tests. Those of the
    fresh process follow, and the files with other processes that take seconds to start, for the same reason.
    """
    slow = {name for _, name in slow_tests()}
    for item in items:
        if slow & {function_of(item), item.path.name}:
            item.add_marker(pytest.mark.slow)
    whole = {item.path for item in items if PROCESSES & _fixtures(item)}
    items.sort(key=lambda item: _shared_work(item, whole))


def _shared_work(item: pytest.Item, whole: Set[Path]) -> int:
    if item.get_closest_marker("smollm2"):
        return 0
    return 1 if "fresh" in _fixtures(item) or item.path in whole else 2


def _fixtures(item: pytest.Item) -> frozenset[str]:
    return frozenset(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    found = Fresh()
    yield found
    found.close()


def pytest_collection_finish() -> None:
    """The modules of torch and transformers are hundreds of thousands of objects, which every full garbage collection
    would go through again: they are left out, and collections are rarer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def slow_tests() -> list[tuple[str, str]]:
    """The lines of the list: why, and what."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    return [(reason, name) for reason, name in map(str.split, lines)]


def function_of(item: pytest.Item) -> str:
    """Its file and function, without its case."""
    return item.nodeid.removeprefix("tests/").partition("[")[0]


class Measure:
    """Adds up what each function takes, with the processes that it starts and the fixtures that are made for it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool | None, bool | None]:
        before = os.times()
        try:
            return (yield)
        finally:
            self.seconds[function_of(item)] += sum(os.times()[:4]) - sum(before[:4])

    def pytest_sessionfinish(self) -> None:
        kept = [line for line in slow_tests() if not line[0][0].isdigit()]
        found = [(f"{seconds:.1f}", name) for name, seconds in sorted(self.seconds.items()) if seconds > LIMIT]
        SLOW.write_text("".join(f"{reason} {name}\n" for reason, name in kept + found), encoding="utf-8")
