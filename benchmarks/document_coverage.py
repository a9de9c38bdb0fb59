"""How often the intervals miss, and how often an artifact at the limit passes, where a document spans several windows.

Windows are cut from documents whose tokens are alike, as by `qexport.text.windows`, and looked at after 24, 48 and 64
of them, as by the defaults of `verify`. An artifact whose true figure equals the limit should pass in at most 5 % of
all measurements. "Windows" takes windows as the units, "documents" takes those of `document_units`. A second table has
documents of one size whose figures are skewed.

    python benchmarks/document_coverage.py
    python benchmarks/document_coverage.py --texts 200 --runs 200
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from qexport.statistics.means import PLANNED_UNITS, Array, Moments, mixture_multiplier, moments, student_multiplier
from qexport.text.windows import HeldOut
from qexport.verifying.units import Units, document_units

LENGTH: Final = 65
"""Tokens of a window; what matters is how many windows a document has."""

LOOKS: Final = (24, 48, 64)
LIMIT: Final = 1.0


@dataclass(frozen=True)
class Text:
    """Documents of a kind.

    Attributes:
        windows: windows per document, the median.
        spread: the standard deviation of the length's logarithm.
        domains: how many, in turns.
        between: the standard deviation of the logarithm of a document's level.
        within: that of a token's, within a document.
        slope: how a document's level depends on its length: the power.
    """

    windows: float
    spread: float = 0.4
    domains: int = 1
    between: float = 0.5
    within: float = 1.0
    slope: float = 0.0


TEXTS: Final = {
    "half a window each": Text(0.5),
    "0.9 of a window each": Text(0.9, spread=0.05),
    "2 windows each": Text(2),
    "4 windows each": Text(4),
    "4 windows each, lengths very different": Text(4, spread=1.0),
    "the same, longer ones drift more": Text(4, spread=1.0, slope=0.3),
    "4 windows each, 4 domains": Text(4, domains=4),
    "0.7 of a window each, 8 domains": Text(0.7, domains=8),
    "8 windows each": Text(8),
}


@dataclass(frozen=True)
class Rates:
    """Shares of the runs.

    Attributes:
        covered: the interval of all windows, for a number that was fixed beforehand, holds the truth.
        missed: the sequence misses the truth at some look.
        passed: a gate at the truth itself passes at some look.
    """

    covered: float
    missed: float
    passed: float


def simulate(text: Text, texts: int, runs: int, seed: int) -> tuple[Rates, Rates]:
    """With windows as the units, and with documents, over so many texts with so many runs each."""
    random = np.random.default_rng(seed)
    found = [_measured(text, runs, random) for _ in range(texts)]
    windows, documents = (Rates(*np.mean([each[kind] for each in found], axis=0).tolist()) for kind in (0, 1))
    return windows, documents


def _measured(text: Text, runs: int, random: np.random.Generator) -> list[list[float]]:
    held_out, lengths = _cut(text, random)
    assert held_out.documents is not None
    documents = held_out.documents[:, 1:].numpy()
    levels = random.normal(size=(len(lengths), runs)) * text.between - text.between**2 / 2
    levels += text.slope * np.log(lengths / (text.windows * LENGTH))[:, None]
    level = np.exp(levels)[documents]  # [windows, tokens, runs]
    noise = np.exp(text.within * random.normal(size=level.shape) - text.within**2 / 2)
    # over all documents of the kind, by tokens: E[length^(1 + slope)] / E[length] for lognormal lengths
    truth = np.exp(((1 + text.slope) ** 2 - 1) * text.spread**2 / 2)
    tokens = level * noise / truth

    def by_windows(windows: int) -> Units:
        return Units(held_out.domains[:windows], "window", LENGTH - 1, PLANNED_UNITS)

    def by_documents(windows: int) -> Units:
        return document_units(held_out, windows, PLANNED_UNITS)

    return [_rates(tokens, units) for units in (by_windows, by_documents)]


def _cut(text: Text, random: np.random.Generator) -> tuple[HeldOut, NDArray[np.float64]]:
    """Windows of all domains in turns, and the length of every document."""
    parts, lengths = [], list[float]()
    each = LOOKS[-1] // text.domains
    for _ in range(text.domains):
        numbers = list[int]()
        while len(numbers) < each * LENGTH:
            length = np.exp(random.normal() * text.spread) * text.windows * LENGTH
            numbers += [len(lengths)] * max(2, round(length))
            lengths.append(length)
        parts.append(np.reshape(numbers[: each * LENGTH], (each, LENGTH)))
    documents = torch.from_numpy(np.stack(parts, axis=1).reshape(-1, LENGTH))
    domains = tuple(f"domain {index % text.domains}" for index in range(len(documents)))
    return HeldOut(torch.zeros_like(documents), domains, "", "", documents=documents), np.array(lengths)


def _rates(tokens: Array, units_of: Callable[[int], Units]) -> list[float]:
    missed, passed = np.zeros(tokens.shape[2], dtype=bool), np.zeros(tokens.shape[2], dtype=bool)
    for windows in LOOKS:
        units = units_of(windows)
        if len(units.domains) == 1:  # one document has no interval
            continue
        found = moments(_means(tokens[:windows], units), units.strata, units.sizes)
        low, high = found.interval(_sequence(found))
        missed |= (low > LIMIT) | (high < LIMIT)
        passed |= high < LIMIT
    low, high = found.interval(student_multiplier(found))  # texts are long enough for several documents at the end
    return [float(((low <= LIMIT) & (high >= LIMIT)).mean()), float(missed.mean()), float(passed.mean())]


def _sequence(found: Moments) -> Array:
    return mixture_multiplier(found, PLANNED_UNITS)


def _means(tokens: Array, units: Units) -> Array:
    """Each unit's mean in every run, [units, runs]."""
    if units.members is None:
        return np.asarray(tokens.mean(axis=1))
    order = np.argsort(units.members, axis=None, kind="stable")
    sizes = np.bincount(units.members.reshape(-1))
    sums = np.add.reduceat(tokens.reshape(-1, tokens.shape[2])[order], np.cumsum(sizes) - sizes, axis=0)
    return np.asarray(sums / sizes[:, None])


Drawn = Callable[[np.random.Generator, tuple[int, int]], Array]
SHAPES: Final[Mapping[str, tuple[float, Drawn]]] = {
    "symmetric (normal)": (0.0, lambda random, shape: random.normal(size=shape)),
    "a few far above (lognormal, sigma 0.8)": (
        float(np.exp(0.32)), lambda random, shape: np.exp(0.8 * random.normal(size=shape))
    ),
    "a few far below (the same, mirrored)": (
        -float(np.exp(0.32)), lambda random, shape: -np.exp(0.8 * random.normal(size=shape))
    ),
    "one in five far below": (
        0.8, lambda random, shape: (random.random(shape) < 0.8) + 0.1 * random.normal(size=shape)
    ),
}  # fmt: skip
"""The mean of a document's figure, and how it is drawn."""

SKEWED_LOOKS: Final = (16, 29, 48, 64)


def skewed(truth: float, drawn: Drawn, runs: int, seed: int) -> tuple[float, float, float]:
    """How often an artifact at an upper and at a lower limit passes at some look, and how often the sequence misses.

    Documents of one size in ten domains.
    """
    values = drawn(np.random.default_rng(seed), (SKEWED_LOOKS[-1], runs))
    below, above = np.zeros(runs, dtype=bool), np.zeros(runs, dtype=bool)
    for documents in SKEWED_LOOKS:
        found = moments(values[:documents], [str(index % 10) for index in range(documents)])
        low, high = found.interval(_sequence(found))
        below |= high < truth
        above |= low > truth
    return float(below.mean()), float(above.mean()), float((below | above).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100, help="texts with other lengths of documents")
    parser.add_argument("--runs", type=int, default=100, help="measurements on each text")
    chosen = parser.parse_args(arguments)
    print("| documents | units | covered by the interval | missed by the sequence | passed at the limit |")
    print("|---|---|---|---|---|")
    for name, text in TEXTS.items():
        found = simulate(text, chosen.texts, chosen.runs, seed=1)
        for kind, rates in zip(("windows", "documents"), found, strict=True):
            shares = " | ".join(f"{100 * share:.1f} %" for share in (rates.covered, rates.missed, rates.passed))
            print(f"| {name} | {kind} | {shares} |", flush=True)
    print("\n| documents' figures | passed at an upper limit | at a lower limit | missed by the sequence |")
    print("|---|---|---|---|")
    for shape, (truth, drawn) in SHAPES.items():
        rates_of_shape = skewed(truth, drawn, chosen.texts * chosen.runs, seed=1)
        print(f"| {shape} | {' | '.join(f'{100 * share:.1f} %' for share in rates_of_shape)} |", flush=True)


if __name__ == "__main__":
    main()
