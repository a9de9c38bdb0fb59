"""A sweep: variants of one recipe, made one after the other and compared."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final

from qexport.amounts import counted, size
from qexport.architectures.devices import find_device
from qexport.artifact.disk import ensure_space, make_folder, write_whole
from qexport.artifact.figures import find_figure
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import LISTING_NAME
from qexport.artifact.report import REPORT_NAME, Report
from qexport.artifact.roots import roots_path
from qexport.artifact.sweep import COMPARISON_NAME, RECORD_NAME, Cost, SweepRecord, VariantRecord, smallest
from qexport.errors import CompatibilityError, InputError, NumericalError, RecipeError
from qexport.execution import execution_of
from qexport.execution.workers import Execution
from qexport.hidden_packages import hidden
from qexport.pipeline.candidates import Candidate, in_order, needed_space, planned_variant, sentence, texts_of
from qexport.pipeline.finished import FinishedRun
from qexport.pipeline.result import Result
from qexport.pipeline.running import run
from qexport.pipeline.sharing import SharedWork
from qexport.pipeline.sweep_result import SweepResult
from qexport.progress import Notice, ProgressCallback, silent
from qexport.recipe.sweep import LoadedSweep, Variant
from qexport.reporting.sweep import sweep_page
from qexport.reporting.writing import write_report
from qexport.verifying.verification import ENDED_EARLY

REPORTS: Final = "reports"
"""The folder of the variants' reports, which stay when artifacts are removed."""

SHARED: Final = ".shared"
"""The folder of what the variants have in common, until all are made."""

_REJECTED: Final = ".rejected"


@hidden("kernels")
def sweep(
    loaded: LoadedSweep,
    *,
    restart: bool = False,
    device: str = "auto",
    command: Callable[[Variant], str] = lambda _: "qexport verify . --reference RECIPE.yaml",
    progress: ProgressCallback = silent,
) -> SweepResult:
    """Makes the variants of a recipe one after the other, each as `run` does, and compares them.

    A variant that cannot be made, or whose gates do not pass, does not end the sweep. A sweep that was stopped is
    continued by the next one: finished variants are recognized, an interrupted one goes on.

    Args:
        loaded: the sweep, see `load_sweep`.
        restart: make all variants again, without what an earlier sweep has finished.
        device: `auto`, `cpu` or `cuda`.
        command: for the reports, the command that repeats the measurement of a variant.
        progress: is called with each step, and with what a user should know.

    Raises:
        QexportError: one of its subclasses, see `qexport.errors`: what would stop every variant, or the disk failed.
    """
    folder, where = _checked_folder(loaded.output), find_device(device)
    candidates = in_order([planned_variant(each, where) for each in loaded.variants], loaded)
    if all(each.refused for each in candidates):
        raise next(each.refused for each in candidates if each.refused)
    ensure_space(folder, needed_space(candidates), replaced=folder)
    make_folder(folder)
    before = None if restart else SweepRecord.read(folder)
    return _Sweeping(loaded, candidates, before, restart, device, command, progress).run()


def _checked_folder(output: Path) -> Path:
    """The sweep's folder with links resolved, which is new, empty, or a sweep's already."""
    folder = Path(os.path.realpath(output))
    if folder.exists() and not folder.is_dir():
        raise RecipeError("the sweep's output is a file, not a folder", where=str(output), mend="choose another output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD_NAME).exists():
        raise RecipeError(
            "the sweep's output is not empty, and not the folder of a sweep",
            where=str(output),
            mend="choose another output",
        )
    return folder


class _Sweeping:
    """A sweep that is running: its record, which is written after each variant."""

    def __init__(
        self,
        loaded: LoadedSweep,
        candidates: Sequence[Candidate],
        before: SweepRecord | None,
        restart: bool,
        device: str,
        command: Callable[[Variant], str],
        progress: ProgressCallback,
    ) -> None:
        self._loaded, self._candidates, self._before = loaded, candidates, before
        self._restart, self._device, self._command, self._progress = restart, device, command, progress
        self._folder = Path(os.path.realpath(loaded.output))
        self._records = {each.variant.name: each.record() for each in candidates}
        self._reports: dict[str, Report] = {}
        self._workers = ExitStack()
        self._execution: Execution | None = None
        self._refused = {each.variant.name: each.refused for each in candidates if each.refused}

    def run(self) -> SweepResult:
        """All variants in turn, on the same workers."""
        with self._workers:
            return self._all()

    def _all(self) -> SweepResult:
        self._write()
        for number, candidate in enumerate(self._candidates, 1):
            name = candidate.variant.name
            if candidate.refused is None:
                self._progress(Notice(f"variant {number} of {len(self._candidates)}: {self._described(candidate)}"))
                self._records[name] = self._made(candidate)
            self._progress(Notice(f"{name}: {self._records[name].state}: {self._records[name].reason}"))
            self._discard()
            self._write()
        shutil.rmtree(self._folder / SHARED, ignore_errors=True)
        return SweepResult(self._folder, self._record(), self._reports, self._refused)

    def _described(self, candidate: Candidate) -> str:
        total = candidate.total_bytes
        sized = "" if total is None else f", {size(total, decimals=1)}"
        return f"{candidate.variant.name} ({candidate.variant.recipe.quantize.title}{sized})"

    def _made(self, candidate: Candidate) -> VariantRecord:
        record = self._records[candidate.variant.name]
        if (known := self._known(candidate)) is not None:
            return known
        if (smaller := self._passed_and_smaller(candidate)) is not None:
            reason = f"larger than {smaller}, which has passed"
            return record.model_copy(update={"state": "skipped", "reason": reason})
        cost = _Stopwatch()
        try:
            result = self._run(candidate)
        except (CompatibilityError, NumericalError) as error:
            self._refused[record.name] = error
            return record.model_copy(
                update={"state": "refused", "reason": sentence(error), "cost": cost.since_the_start()}
            )
        if result.unproven_merge is not None:
            raise result.unproven_merge.error
        return self._measured(candidate, result.artifact_path, result.reports, cost.since_the_start())

    def _run(self, candidate: Candidate) -> Result:
        return run(
            candidate.variant.recipe,
            force=self._restart,
            restart=self._restart,
            device=self._device,
            command=self._command(candidate.variant),
            shared=SharedWork(self._folder / SHARED, ends_early=True),
            execution=self._started(),
            progress=self._progress,
        )

    def _started(self) -> Execution:
        """The workers, which start with the first variant that is made. All variants ask for the same."""
        if self._execution is None:
            settings = self._candidates[0].variant.recipe.execution
            self._execution = self._workers.enter_context(execution_of(settings, find_device(self._device)))
        return self._execution

    def _passed_and_smaller(self, candidate: Candidate) -> str | None:
        if self._loaded.keep == "all" or (own := candidate.total_bytes) is None:
            return None
        passed = [each for each in self._records.values() if each.passed and each.total_bytes is not None]
        return next((each.name for each in passed if each.total_bytes is not None and each.total_bytes < own), None)

    def _known(self, candidate: Candidate) -> VariantRecord | None:
        """What an earlier sweep has made of a variant, if its inputs and files are the same still."""
        name = candidate.variant.name
        earlier = self._before.variant(name) if self._before else None
        places = [path for path in self._places(name) if path.is_dir()]
        if self._restart or not (places or (earlier and earlier.measured)):
            return None
        if earlier and earlier.identity == candidate.identity and self._is_whole(earlier, candidate):
            self._reports[name] = Report.read(self._folder / str(earlier.report))
            return earlier
        planned = candidate.planned
        assert planned is not None
        finished = FinishedRun(planned, texts_of(candidate.variant, planned), find_device(self._device))
        found = next((path for path in places if finished.is_in(path)), None)
        return None if found is None else self._measured(candidate, found, finished.reports, None)

    def _places(self, name: str) -> tuple[Path, Path]:
        """Where a variant's artifact may be."""
        return self._folder / name, self._folder / f"{name}{_REJECTED}"

    def _is_whole(self, record: VariantRecord, candidate: Candidate) -> bool:
        """Whether the report of a finished variant is there, and its artifact if that is to be kept."""
        needed = self._loaded.keep == "all" or (record.passed and self._passed_and_smaller(candidate) is None)
        if record.report is None or (needed and record.folder is None):
            return False
        try:
            Report.read(self._folder / record.report)
            for layout in _layouts_in(self._folder / record.folder) if record.folder else ():
                open_artifact(layout)
        except InputError:
            return False
        return True

    def _measured(
        self, candidate: Candidate, path: Path, reports: Mapping[str, Report], cost: Cost | None
    ) -> VariantRecord:
        """The record of a variant that has been made. Its report is kept apart from its artifact."""
        name, report = candidate.variant.name, _worst(reports)
        write_report(report, self._folder / REPORTS / name)
        self._reports[name] = report
        return self._records[name].model_copy(
            update={
                "state": report.verdict,
                "reason": _reason(report),
                "total_bytes": candidate.total_bytes or report.subject.sizes.total_bytes,
                "folder": path.name,
                "report": f"{REPORTS}/{name}/{REPORT_NAME}",
                "windows": report.protocol.windows,
                "cost": cost,
                "identity": candidate.identity,
            }
        )

    def _discard(self) -> None:
        """Removes the artifacts of all but the recommended variant, if only that is kept. The record says so first."""
        if self._loaded.keep == "all":
            return
        best = self._recommended()
        others = [each for each in self._records.values() if each.measured and each.name != best]
        self._records |= {each.name: each.model_copy(update={"folder": None}) for each in others}
        self._write()
        for each in others:
            for path in self._places(each.name):
                shutil.rmtree(path, ignore_errors=True)
                roots_path(path).unlink(missing_ok=True)

    def _recommended(self) -> str | None:
        passing = [
            (each, each.total_bytes, figure.value)
            for each in self._records.values()
            if each.passed
            and each.total_bytes is not None
            and (figure := find_figure(self._reports[each.name].figures, "mean_kl"))
        ]
        best = smallest(passing)
        return None if best is None else best.name

    def _record(self) -> SweepRecord:
        records = [self._records[each.variant.name] for each in self._candidates]
        return SweepRecord(
            schema_version=1,
            qexport_version=version("qexport"),
            recipe=self._loaded.recipe.name,
            keep=self._loaded.keep,
            variants=records,
            recommended=self._recommended(),
            finished=all(each.state != "waiting" for each in records),
        )

    def _write(self) -> None:
        """Writes the record and the page as they stand. Variants that an earlier sweep has finished keep their records
        until their turn comes.
        """
        record = self._record()
        earlier = {} if self._before is None else {each.name: each for each in self._before.variants}
        kept = [earlier.get(each.name, each) if each.state == "waiting" else each for each in record.variants]
        record.model_copy(update={"variants": kept}).write(self._folder)
        write_whole(self._folder / COMPARISON_NAME, sweep_page(record, self._reports))


class _Stopwatch:
    """What this process takes from now on."""

    def __init__(self) -> None:
        self._cpu, self._wall = _processor_seconds(), time.monotonic()

    def since_the_start(self) -> Cost:
        return Cost(
            cpu_seconds=round(_processor_seconds() - self._cpu, 1), seconds=round(time.monotonic() - self._wall, 1)
        )


def _processor_seconds() -> float:
    return sum(os.times()[:4])


def _layouts_in(folder: Path) -> list[Path]:
    """The folder of an artifact, or those of its layouts."""
    below = [path for path in sorted(folder.iterdir()) if (path / LISTING_NAME).is_file()] if folder.is_dir() else []
    return below or [folder]


_BADNESS: Final = {"fail": 2, "undecided": 1, "pass": 0}


def _worst(reports: Mapping[str, Report]) -> Report:
    """Of several layouts, the report of the one that came off worst: a variant passes if all do."""

    def key(report: Report) -> tuple[int, float]:
        figure = find_figure(report.figures, "mean_kl")
        return _BADNESS[report.verdict], figure.value if figure else 0.0

    return max(reports.values(), key=key)


def _reason(report: Report) -> str:
    """The first gate that has the report's verdict; that all passed, if so."""
    own = [each for each in report.gates if each.verdict == report.verdict]
    if report.verdict == "pass":
        return f"{counted(len(own), 'gate')} passed"
    rest = f"; {len(own) - 1} more" if len(own) > 1 else ""
    ended = f"; stopped after {counted(report.protocol.windows, 'window')}" if ENDED_EARLY in report.notes else ""
    return f"{own[0].name} {own[0].reason}{rest}{ended}"
