"""The attempts of a run: where an artifact misses the target of the method `mixed`, a larger choice is made, and the
model quantized and verified again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from qexport.artifact.disk import ensure_space
from qexport.artifact.manifest import Manifest
from qexport.artifact.publish import temporary_path
from qexport.artifact.report import Report
from qexport.execution.workers import Execution
from qexport.pipeline.made_choice import MadeChoice
from qexport.pipeline.measuring import losses_of
from qexport.pipeline.mixing import choose
from qexport.pipeline.planning import Plan
from qexport.pipeline.resuming import RunJournal
from qexport.pipeline.texts import Texts
from qexport.progress import Notice, ProgressCallback

MOST_ATTEMPTS: Final = 3
"""Each may pass a gate by chance, and takes as long as a run of its own."""


class Attempts:
    """The plans that a run carries out, one after the other; a method other than `mixed` has one.

    Args:
        planned: the run's plan, before a choice is made.
        texts: its texts.
        output: the run's output.
        device: where to measure.
        execution: the workers.
        journal: keeps each choice.
        recorded: the manifest of an artifact, whose choice is taken over: nothing is measured then, and there is one
            attempt. None to choose.
        progress: is called with what is chosen.
    """

    def __init__(
        self,
        planned: Plan,
        texts: Texts,
        output: Path,
        device: torch.device,
        execution: Execution,
        journal: RunJournal,
        recorded: Manifest | None,
        progress: ProgressCallback,
    ) -> None:
        self._planned, self._texts, self._output = planned, texts, output
        self._device, self._execution = device, execution
        self._journal, self._recorded, self._progress = journal, recorded, progress
        self._made: MadeChoice | None = None

    def first(self) -> Plan:
        """The plan to begin with: for `mixed` that of an interrupted run's last choice, if there is one.

        Raises:
            CompatibilityError: the target is out of reach.
            InputError: the recorded choice is not one of this recipe.
            ResourceError: there is not enough room on the disk.
        """
        planned = self._planned
        if planned.space is None or self._texts.calibration is None:
            return planned
        if self._recorded is not None:
            notes = [note for note in self._recorded.notes if note.startswith(planned.method.title)]
            return self._prepared(planned.with_options(planned.space.recorded(self._recorded.layers), notes))
        layout = planned.layouts[0]
        if (choice := self._journal.choice) is None:
            losses = losses_of(
                planned,
                planned.space,
                self._texts.calibration,
                self._output,
                self._device,
                self._execution,
                progress=self._progress,
            )
            choice = choose(planned.space, layout, losses)
            self._journal.begin_attempt(choice)
        return self._chosen(MadeChoice(planned.space, layout, choice))

    def after(self, reports: Mapping[str, Report]) -> Plan | None:
        """The plan with the next larger choice, where the artifact misses the target and there may be another attempt.
        The journal keeps the choice first: from then on what the attempt before has written counts no more.

        Args:
            reports: of the artifact's layouts.

        Returns:
            None if the run ends with this artifact.

        Raises:
            ResourceError: there is not enough room on the disk.
        """
        made, gates = self._made, [gate for report in reports.values() for gate in report.gates]
        if made is None or (missed := made.missed(gates)) is None:
            return None
        larger = made.larger(missed) if made.attempt < MOST_ATTEMPTS else None
        if larger is None:
            self._progress(Notice(made.advice(missed)))
            return None
        again = f"attempt {larger.attempt} of at most {MOST_ATTEMPTS} begins with a larger choice"
        self._progress(Notice(f"{made.outcome(missed)}: {again}"))
        self._journal.begin_attempt(larger.choice)
        return self._chosen(larger)

    def _chosen(self, made: MadeChoice) -> Plan:
        self._made = made
        planned = self._planned.choosing(made)
        for line in (made.notes[-1], *planned.short_lines()[-2:]):
            self._progress(Notice(line))
        return self._prepared(planned)

    def _prepared(self, planned: Plan) -> Plan:
        ensure_space(self._output, planned.expected.disk, replaced=temporary_path(self._output))
        for layout in planned.layouts:
            layout.prepare()
        return planned
