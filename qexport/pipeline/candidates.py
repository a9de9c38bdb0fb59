"""The variants of a sweep before they are made: their plans, what decides their bytes, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qexport.artifact.digests import sha256_json
from qexport.artifact.sweep import VariantRecord
from qexport.errors import QexportError
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.resuming import identity, stamps_of
from qexport.pipeline.sharing import shared_bytes
from qexport.pipeline.texts import Texts, read_texts
from qexport.recipe.sweep import LoadedSweep, Variant


@dataclass(frozen=True)
class Candidate:
    """A variant and its plan, or what is wrong with it.

    Attributes:
        variant: from the sweep's file.
        planned: None if it cannot be made.
        identity: the digest of all that decides its bytes and figures.
        refused: why it cannot be made.
    """

    variant: Variant
    planned: Plan | None = None
    identity: str | None = None
    refused: QexportError | None = None

    @property
    def total_bytes(self) -> int | None:
        """Of the tensors of its largest layout; None if that is not known before it is made."""
        if self.planned is None or self.planned.space is not None:
            return None
        return max(layout.weights.total_bytes for layout in self.planned.layouts)

    def record(self) -> VariantRecord:
        """What is known of it before its turn."""
        refused = self.refused
        return VariantRecord(
            name=self.variant.name,
            method=self.variant.recipe.quantize.title,
            overrides=list(self.variant.overrides),
            state="waiting" if refused is None else "refused",
            reason="its turn has not come" if refused is None else sentence(refused),
            total_bytes=self.total_bytes,
            folder=None,
            report=None,
            windows=None,
            cost=None,
            identity=None,
        )


def planned_variant(variant: Variant, device: torch.device) -> Candidate:
    """A variant with its plan. Its texts are read too: what is wrong with them is found before any work."""
    try:
        planned = plan(variant.recipe)
        return Candidate(variant, planned, _identity(planned, texts_of(variant, planned), device))
    except QexportError as error:
        if type(error) is QexportError:
            raise
        return Candidate(variant, refused=error)


def texts_of(variant: Variant, planned: Plan) -> Texts:
    """A variant's texts as tokens."""
    return read_texts(variant.recipe, planned.merged.checkpoint, planned.structure)


def _identity(planned: Plan, texts: Texts, device: torch.device) -> str:
    """The digest of all that decides a variant's bytes and figures. The base's files count as others when their times
    change.
    """
    files = stamps_of(planned.merged.checkpoint.origin.sha256)
    return sha256_json({**identity(planned, texts, device), "files": files})


def in_order(candidates: list[Candidate], loaded: LoadedSweep) -> list[Candidate]:
    """The smallest first if only the best is kept: those that are larger than one that passes need not be made."""
    if loaded.keep == "all":
        return candidates
    return sorted(candidates, key=lambda each: (each.total_bytes is None, each.total_bytes or 0))


def sentence(error: QexportError) -> str:
    """An error on one line, without what may help."""
    return f"{error.what} ({error.where})" if error.where else error.what


def needed_space(candidates: Sequence[Candidate]) -> int:
    """Bytes on the disk at most: what the variants share, all artifacts, and what one run takes besides."""
    plans = [each.planned for each in candidates if each.planned]
    shared, running = max(map(shared_bytes, plans)), max(planned.expected.disk for planned in plans)
    return shared + running + sum(planned.total_bytes for planned in plans)
