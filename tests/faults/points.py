"""What a run leaves behind after a fault at one of its file operations, and after it was simply run again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import factories
from artifact_cases import LAYOUTS, prepare, recipe
from qexport.artifact.digests import sha256_bytes
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import LISTING_NAME, REPORT_FOLDER
from qexport.artifact.partial import MARKER_NAME
from qexport.artifact.roots import recording_roots, roots_path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("shim.c")

CHANGE, WRITE, GROW, READ = 1, 2, 4, 8
KILL, TEAR, FAIL, FAIL_FROM_THEN_ON = 1, 2, 3, 4

NEVER = 1 << 40
"""A number that no run has operations for."""

Kind = Literal["kill", "torn write", "full disk", "disk error"]
Old = Literal["nothing", "artifact", "folder", "rejected"]
KINDS: Final[Mapping[Kind, tuple[int, int, int]]] = {
    "kill": (KILL, CHANGE, 0),
    "torn write": (TEAR, WRITE, 0),
    "full disk": (FAIL_FROM_THEN_ON, GROW, errno.ENOSPC),
    "disk error": (FAIL, CHANGE | READ, errno.EIO),
}
"""The fault, the operations that it may meet, and the error's number."""

_READS = {"open": READ, "read": READ}
_CHANGES = {"write": CHANGE | WRITE | GROW, "unlink": CHANGE}

Files = Mapping[str, bytes]
"""The content of every file by its path. A report has timings, so only its name counts."""


@dataclass(frozen=True)
class Case:
    """A run: what it makes, and what it finds.

    Attributes:
        method: in `artifact_cases.METHODS`.
        layout: in `artifact_cases.LAYOUTS`.
        old: what is at the final path. With `rejected` a gate fails, and the artifact of an earlier run lies there.
        exchange: whether the file system can exchange two folders.
        verified: whether the artifact is measured and gets a report.
    """

    method: str
    layout: str
    old: Old = "nothing"
    exchange: bool = True
    verified: bool = False

    @property
    def result(self) -> str:
        """The name of the folder that it makes."""
        return "out.rejected" if self.old == "rejected" else "out"

    @property
    def forced(self) -> bool:
        return self.old in ("artifact", "folder")


@dataclass(frozen=True)
class Point:
    """A fault at one operation of a run, counted from 1."""

    case: Case
    kind: Kind
    number: int


@dataclass(frozen=True)
class Operation:
    """A file operation of a run, as the shim tells it."""

    name: str
    path: str
    other: str

    def counts(self, kind: Kind) -> bool:
        """Whether a kind of fault can meet it; the shim decides by the same classes."""
        return bool(KINDS[kind][1] & (_READS | _CHANGES).get(self.name, CHANGE | GROW))


@dataclass(frozen=True)
class Answer:
    """How a run ended: the exit code or minus the signal, the operations that counted, and what was on stderr."""

    code: int
    count: int
    told: str


class Harness:
    """The process that forks runs, and the models that they read.

    Args:
        folder: empty; everything is written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()
        prepare("llama", folder / "model")
        factories.write_text(folder / "held-out.jsonl", passages=20, seed=3)
        shim = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SOURCE, "-ldl"], check=True)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.preloaded"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        self._whole = cache(self._make_whole)
        self.operations = cache(self._operations)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def uninterrupted(self, case: Case) -> Files:
        """What the case makes without a fault."""
        return self._whole(replace(case, old="rejected" if case.old == "rejected" else "nothing", exchange=True))

    def _make_whole(self, case: Case) -> Files:
        """Made in the process itself, which has then imported and cached all that its children need."""
        output = self._folder / f"whole-{next(self._numbers)}"
        found = self.run(case, output / "out", fork=False)
        assert found.code == expected_code(case), found.told
        return files_in(output / case.result)

    def _operations(self, case: Case, plant: str | None = None) -> tuple[Path, list[Operation]]:
        """The final path, and the file operations that lead to it."""
        self.uninterrupted(case)
        log = self._folder / "log"
        with self.prepared(case) as output:
            ended = self.run(case, output, fault=("kill", NEVER), log=log, plant=plant)
            assert ended.code == expected_code(case), ended.told
        operations = [Operation(*line.split("\t")) for line in log.read_text().splitlines()]
        log.unlink()
        assert ended.count == sum(operation.counts("kill") for operation in operations)
        return output.with_name(case.result), operations

    def counted(self, case: Case, kind: Kind) -> int:
        """How many operations of a run a kind of fault can meet."""
        return sum(operation.counts(kind) for operation in self.operations(case)[1])

    def publishing(self, case: Case, kind: Kind) -> int:
        """The number, among those that a kind of fault can meet, of the first rename that moves a folder into place."""
        operations = [each for each in self.operations(case)[1] if each.counts(kind)]
        return next(
            number
            for number, each in enumerate(operations, 1)
            if each.name in ("rename", "exchange") and each.path.endswith((f"/{case.result}", "/out.partial"))
        )

    def problems(self, point: Point, *, plant: str | None = None) -> list[str]:
        """What does not hold after the fault at a point, and after a second run."""
        case = point.case
        with self.prepared(case) as output:
            first = self.run(case, output, fault=(point.kind, point.number), plant=plant)
            found = [*self._after_fault(point, output, first)]
            done = whole(output.with_name(case.result), self.uninterrupted(case)) is None
            finished = self._finished(case, output)
            second = self.run(case, output, plant=plant)
            code = 2 if done and case.old == "nothing" else expected_code(case)
            if second.code != code:
                found.append(f"run again, it ends with {second.code}: {second.told}")
            if problem := whole(output.with_name(case.result), self.uninterrupted(case)):
                found.append(f"run again, the artifact {problem}")
            if finished and finished != written(output.with_name(case.result)):
                found.append("run again, it makes anew what was finished")
            expected = [case.result, roots_path(Path(case.result)).name]
            if (names := sorted(path.name for path in output.parent.iterdir())) != expected:
                found.append(f"run again, it leaves {names}")
        return [f"{point}: {problem}" for problem in found]

    def _finished(self, case: Case, output: Path) -> list[tuple[int, int]]:
        """When the files of a folder were written that is finished and was not moved to its path; empty if none is."""
        partial = output.with_name(f"{output.name}.partial")
        return [] if whole(partial, self.uninterrupted(case)) else written(partial)

    def _after_fault(self, point: Point, output: Path, ended: Answer) -> list[str]:
        case, found = point.case, []
        allowed = {"kill": {-9}, "torn write": {-9}}.get(point.kind, {8, expected_code(case)})
        if ended.code not in allowed or "Traceback" in ended.told:
            found.append(f"it ends with {ended.code}: {ended.told}")
        states = [self.uninterrupted(case)] + ([self.old(case)] if case.old != "nothing" else [])
        path = output.with_name(case.result)
        if path.exists() and all(whole(path, state) for state in states):
            found.append(f"what stands at the final path {[whole(path, state) for state in states]}")
        if case.old == "rejected" and output.exists():
            found.append("a rejected artifact is at the final path")
        # Without an exchange there is a moment between two renames: a kill in it leaves the old folder aside, as does
        # a disk on which nothing can be renamed back.
        aside, told = path.with_name(f"{path.name}.replaced"), "put back" in ended.told
        excused = not case.exchange and (ended.code == -9 or told) and whole(aside, states[-1]) is None
        if case.old != "nothing" and not path.exists() and not excused:
            found.append("neither the old folder nor the new one is at the final path")
        if ended.code in (0, 6, 7) and path.exists() and whole(path, states[0]):
            found.append("it says that it is done, and is not")
        return found

    def old(self, case: Case) -> Files:
        """The files that a case finds at the path of its result."""
        if case.old == "folder":
            return {"thesis.txt": b"mine", "sub/figure": b"mine too"}
        return self.uninterrupted(Case("none", "safetensors"))

    def prepared(self, case: Case) -> Prepared:
        """The output's path in a folder of its own, with the old files of the case."""
        parent = self._folder / f"point-{next(self._numbers)}"
        if case.old == "nothing":
            return Prepared(parent, parent / "new" / "out")
        write_files(old := self.old(case), parent / case.result)
        if LISTING_NAME in old:
            with recording_roots(parent / case.result, {".": sha256_bytes(old[LISTING_NAME])}):
                pass
        return Prepared(parent, parent / "out")

    def run(
        self,
        case: Case,
        output: Path,
        *,
        fork: bool = True,
        fault: tuple[Kind, int] | None = None,
        log: Path | None = None,
        plant: str | None = None,
    ) -> Answer:
        """`qexport run`, with a fault at an operation below the folder in which the output's parents are made."""
        arguments = ["run", str(self._recipe(case)), "--output", str(output), *(["--force"] if case.forced else [])]
        armed = None
        if fault or not case.exchange:
            kind, mask, code = KINDS[fault[0]] if fault else (0, 0, 0)
            number = fault[1] if fault else NEVER
            armed = [str(self._below(output)), str(log or ""), kind, mask, number, code, not case.exchange]
        return self._ask(arguments=arguments, fault=armed, fork=fork, plant=plant)

    def _below(self, output: Path) -> Path:
        return self._folder / output.relative_to(self._folder).parts[0]

    def _ask(self, **question: Any) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def _recipe(self, case: Case) -> Path:
        content = recipe(self._folder / "model", case.method, LAYOUTS[case.layout])
        if case.verified or case.old == "rejected":
            windows = 64 if case.old == "rejected" else 2  # a gate needs several documents
            gates = {"perplexity_ratio": {"at_most": 0.5}} if case.old == "rejected" else {}
            content["verify"] = {"text": str(self._folder / "held-out.jsonl"), "sequence_length": 16}
            content["verify"] |= {"windows": windows, "max_windows": windows, "profile": "off", "gates": gates}
        path = self._folder / "recipe.yaml"
        path.write_text(json.dumps(content))
        return path


class Prepared:
    """A folder that is removed afterwards; the context is the output's path in it."""

    def __init__(self, folder: Path, output: Path) -> None:
        self._folder, self._output = folder, output
        folder.mkdir(exist_ok=True)

    def __enter__(self) -> Path:
        return self._output

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)


def expected_code(case: Case) -> int:
    return 6 if case.old == "rejected" else 0


def files_in(folder: Path) -> Files:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    report = f"{REPORT_FOLDER}/"
    timed = (report, LISTING_NAME) if any(report in name for name in paths) else ()  # a report holds the time
    return {name: b"" if any(part in name for part in timed) else path.read_bytes() for name, path in paths.items()}


def written(folder: Path) -> list[tuple[int, int]]:
    """Which files these are, and when they were written."""
    found = [path.stat() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(each.st_ino, each.st_mtime_ns) for each in found]


def write_files(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def whole(folder: Path, expected: Files) -> str | None:
    """What is wrong with a folder that is to hold exactly these files; a folder of the user may have the marker."""
    if not folder.is_dir():
        return "is missing"
    found = files_in(folder)
    if "thesis.txt" in expected:
        found = {name: content for name, content in found.items() if name != MARKER_NAME}
    if found != expected:
        names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
        return f"differs in {sorted(names)}"
    for manifest in folder.rglob("qexport-manifest.json"):
        open_artifact(manifest.parent)
    return None


def spread(first: int, last: int, wanted: int) -> list[int]:
    """At most `wanted` whole numbers from the first to the last, at equal distances."""
    if wanted >= last - first + 1:
        return list(range(first, last + 1))
    return [first + round(index * (last - first) / max(1, wanted - 1)) for index in range(wanted)]


def not_durable(result: Path, operations: Sequence[Operation]) -> list[str]:
    """What a loss of power could take from a published artifact although its name is there, or the name itself."""
    found: list[str] = []
    unsynced: set[str] = set()  # files with new content, folders with new names
    published = synced = False
    for operation in operations:
        path, other = operation.path, operation.other
        match operation.name:
            case "write" | "ftruncate" | "ftruncate64" | "truncate":
                unsynced.add(path)
            case "create" | "mkdir":
                unsynced |= {path, str(Path(path).parent)}
            case "link":
                unsynced |= {str(Path(other).parent)} | ({other} if path in unsynced else set())
            case "fsync" | "fdatasync":
                unsynced.discard(path)
                synced |= published and path == str(result.parent)
            case "unlink":
                unsynced -= {path}
                unsynced.add(str(Path(path).parent))
                if published and not synced:
                    found.append(f"{path} is removed before the artifact's name is on the disk")
            case "rename" | "exchange":
                below = {each for each in unsynced if f"{each}/".startswith(f"{path}/")}
                if other == str(result):
                    published = True
                    found += [f"{each} is not on the disk before it is published" for each in below if is_kept(each)]
                else:
                    unsynced |= {other + each.removeprefix(path) for each in below}
                unsynced -= below
                unsynced |= {str(Path(path).parent), str(Path(other).parent)}
    above = [str(each) for each in result.parent.parents]
    found += [f"a name in {each} is not on the disk" for each in above if each in unsynced]
    return found if synced else [*found, "the artifact's name is not on the disk"]


def is_kept(path: str) -> bool:
    """A file without a name is gone with its process."""
    return not path.endswith(" (deleted)")
