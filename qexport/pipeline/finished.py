"""A run that was stopped while it published: its folder is finished, and the next run only publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.artifact.disk import disk_failure
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import InputError
from qexport.pipeline.planning import Plan
from qexport.pipeline.recording import made_from
from qexport.pipeline.texts import Evaluation, Texts


class FinishedRun:
    """What a run of the same recipe and inputs has finished and not published.

    Args:
        planned: this run's plan.
        texts: its texts.
        device: where it computes.

    Attributes:
        manifests: of each layout's folder, by the layout's name, once `is_in` has found them.
        reports: likewise; empty if the recipe has no `verify`.
        roots: likewise, the root digests.
    """

    def __init__(self, planned: Plan, texts: Texts, device: torch.device) -> None:
        self._planned, self._texts, self._device = planned, texts, device
        self.manifests: Mapping[str, Manifest] = {}
        self.reports: Mapping[str, Report] = {}
        self.roots: Mapping[str, str] = {}

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds all that this run would make. Every file is compared with its digest, and the inputs
        with those that the manifests name.

        Raises:
            InputError: the disk failed.
            OSError: likewise.
        """
        paths = {layout.name: self._planned.folder(folder, layout) for layout in self._planned.layouts}
        try:
            # an artifact that was replaced lies there too: another recipe shows without hashing anything
            if any(Manifest.read(path).recipe != self._planned.recipe.portable() for path in paths.values()):
                return False
            found = {name: open_artifact(path) for name, path in paths.items()}
            self.reports = {
                name: Report.read(paths[name]) for name, each in found.items() if each.manifest.verification
            }
        except InputError as error:
            if disk_failure(error, where=None):
                raise
            return False
        self.manifests = {name: each.manifest for name, each in found.items()}
        self.roots = {name: each.root for name, each in found.items() if each.root is not None}
        return self._has_comparable_tasks() and self._has_same_texts() and self._has_same_inputs()

    def _has_same_inputs(self) -> bool:
        own = made_from(self._planned, self._texts.calibration, self._device)
        return all(getattr(each, field) == value for each in self.manifests.values() for field, value in own.items())

    def _has_comparable_tasks(self) -> bool:
        """Whether there are none: only the harness knows their items, once they are answered."""
        verify = self._planned.recipe.verify
        return verify is None or verify.tasks is None

    def _has_same_texts(self) -> bool:
        own = _digests_of_texts(self._texts.evaluation)
        return all(_digests_in_report(each) == own for each in self.reports.values())


@dataclass(frozen=True)
class _Digests:
    """Of the held-out text, the prompts, each suite's prompts and the baseline's report; None for what is not used."""

    text: str | None = None
    prompts: str | None = None
    formats: str | None = None
    refusals: str | None = None
    needles: str | None = None
    baseline: str | None = None


def _digests_of_texts(evaluation: Evaluation | None) -> _Digests:
    if evaluation is None:
        return _Digests()
    suites = evaluation.suites
    needles = suites.lengths.needles if suites.lengths else None
    return _Digests(
        evaluation.held_out.sha256,
        evaluation.prompts.prompt_set.sha256 if evaluation.prompts else None,
        suites.formats.prompts.sha256 if suites.formats else None,
        suites.refusals.requests.sha256 if suites.refusals else None,
        needles.sha256 if needles else None,
        evaluation.baseline.record.report_sha256 if evaluation.baseline else None,
    )


def _digests_in_report(report: Report) -> _Digests:
    formats, refusals, needles = report.formats, report.refusals, report.needles
    return _Digests(
        report.identity.text_sha256,
        report.identity.prompts_sha256,
        formats.sha256 if formats else None,
        refusals.sha256 if refusals else None,
        needles.sha256 if needles else None,
        report.baseline.report_sha256 if report.baseline else None,
    )
