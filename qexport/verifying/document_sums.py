"""What a report holds of each document, for the comparison with a later release; and that comparison, paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.artifact import Identity
from qexport.artifact.baseline import BaselineRecord, DocumentSums
from qexport.artifact.digests import sha256_bytes, tensor_bytes
from qexport.artifact.figures import Figure
from qexport.statistics.samples import DIFFERENCE
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import by_domain, decisive_flips
from qexport.verifying.units import Units

_DIGITS: Final = 9
_IN_DIGEST: Final = 16

Window = tuple[str, tuple[int, ...]]
"""What a window is recognized by: the digest of its tokens, and the number of tokens in each of its parts."""


@dataclass(frozen=True)
class Baseline:
    """A release that artifacts are compared with.

    Attributes:
        record: what reports say of it.
        sums: by document, from its report.
        identity: of what it was measured on.
    """

    record: BaselineRecord
    sums: DocumentSums
    identity: Identity

    def shared_rows(self, windows: Sequence[Window]) -> list[int]:
        """Which of these windows it was measured on too."""
        known = set(windows_of(self.sums))
        return [row for row, window in enumerate(windows) if window in known]


def windows_of(sums: DocumentSums) -> list[Window]:
    """The windows that were summed."""
    ends = np.cumsum(sums.parts).tolist()
    return [
        (digest, tuple(sums.tokens[end - count : end]))
        for digest, end, count in zip(sums.windows, ends, sums.parts, strict=True)
    ]


def held_out_windows(held_out: HeldOut) -> list[Window]:
    """All windows of the held-out text."""
    starts, length = _starts(held_out, len(held_out.input_ids)), held_out.input_ids.shape[1] - 1
    return [
        (digest, tuple(np.diff(np.append(np.flatnonzero(row), length)).tolist()))
        for digest, row in zip(_digests(held_out.input_ids), starts, strict=True)
    ]


def document_sums(tokens: TokenFigures, held_out: HeldOut) -> DocumentSums:
    """Sums over each document in each window.

    Args:
        tokens: the artifact compared with the reference.
        held_out: the text, whose first windows were measured.
    """
    windows = len(tokens.kl)
    starts = _starts(held_out, windows)
    part = starts.reshape(-1).cumsum() - 1
    return DocumentSums(
        windows=_digests(held_out.input_ids[:windows]),
        parts=starts.sum(axis=1).tolist(),
        tokens=np.bincount(part).tolist(),
        kl=_rounded(_total(part, tokens.kl)),
        nll=_rounded(_total(part, tokens.artifact_nll - tokens.reference_nll)),
        changed=_counted(_total(part, tokens.flipped)),
        decisive_flips=_counted(_total(part, decisive_flips(tokens))),
    )


def _starts(held_out: HeldOut, windows: int) -> NDArray[np.bool_]:
    """Which predicted tokens [windows, tokens] are the first ones of a document in their window."""
    starts = np.zeros((windows, held_out.input_ids.shape[1] - 1), dtype=bool)
    starts[:, 0] = True
    if held_out.documents is not None:
        owners = held_out.documents[:windows, 1:].numpy()
        starts[:, 1:] = owners[:, 1:] != owners[:, :-1]
    return starts


def _digests(input_ids: Tensor) -> list[str]:
    return [sha256_bytes(tensor_bytes(row))[:_IN_DIGEST] for row in input_ids]


def _total(part: NDArray[np.intp], values: Tensor) -> NDArray[np.float64]:
    """The sum of tokens' values over each part; numpy adds in the order of the tokens."""
    return np.asarray(np.bincount(part, weights=values.reshape(-1).numpy()), dtype=np.float64)


def _rounded(sums: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in sums.tolist()]


def _counted(sums: NDArray[np.float64]) -> list[int]:
    return [round(value) for value in sums.tolist()]


def baseline_figures(sums: DocumentSums, baseline: Baseline, units: Units) -> list[Figure]:
    """The artifact compared with a release on the windows that both were measured on, over all of them and by domain.

    Every figure is a mean of differences over the same tokens, so what makes a document hard for both cancels out.

    Args:
        sums: the artifact's.
        baseline: the release.
        units: the documents of all windows in `sums`.
    """
    windows, place = windows_of(sums), {window: row for row, window in enumerate(windows_of(baseline.sums))}
    rows = baseline.shared_rows(windows)
    if not rows:
        return []
    own, other = _by_token(sums, rows), _by_token(baseline.sums, [place[windows[row]] for row in rows])
    differences = {name: values - other[name] for name, values in own.items()}
    # Equal sums of divergences are those of equal predictions: there is nothing left to be uncertain about.
    trials = 1 if any(bool(differences[name].any()) for name in ("kl", "nll")) else None

    def estimate(chosen: Units, mask: NDArray[np.bool_]) -> list[Figure]:
        means = {name: chosen.means(values[torch.from_numpy(mask)]) for name, values in differences.items()}
        return [
            chosen.mean("baseline_mean_kl", means["kl"]),
            chosen.mean("baseline_perplexity_ratio", means["nll"], function=math.exp),
            chosen.mean("baseline_top1_agreement", 0.0 - means["changed"], DIFFERENCE, trials=trials),
            chosen.mean("baseline_decisive_flips", means["decisive_flips"], DIFFERENCE, trials=trials),
        ]

    return by_domain(units.chosen(rows), estimate)


def _by_token(sums: DocumentSums, rows: Sequence[int]) -> Mapping[str, Tensor]:
    """Values [windows, tokens] whose sums over each part of these windows are the recorded ones."""
    ends = np.cumsum(sums.parts)
    parts = np.concatenate([np.arange(ends[row] - sums.parts[row], ends[row]) for row in rows])
    sizes = np.asarray(sums.tokens)[parts]

    def spread(values: Sequence[Any]) -> Tensor:
        each = np.asarray(values, dtype=np.float64)[parts] / sizes
        return torch.from_numpy(np.repeat(each, sizes).reshape(len(rows), -1))

    return {name: spread(getattr(sums, name)) for name in ("kl", "nll", "changed", "decisive_flips")}
