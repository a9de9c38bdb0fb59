"""Drift of a known size, measured on windows of eight domains that take turns."""

from __future__ import annotations

from typing import Final

import numpy as np

from qexport.statistics.means import Array

DOMAINS: Final = 8
LOOKS: Final = tuple(range(8, 65, 8))
SCALES: Final = np.exp(np.linspace(-0.7, 0.7, DOMAINS))
MEAN: Final = float(SCALES.mean())


def strata_of(units: int) -> list[str]:
    return [f"domain {unit % DOMAINS}" for unit in range(units)]


def drift(kind: str, units: int, runs: int, seed: int) -> Array:
    """Positive window means [units, runs] around MEAN, whose level and scatter differ fourfold between domains."""
    random = np.random.default_rng(seed)
    size = (units, runs)
    noise = {
        "normal": lambda: random.normal(1, 0.5, size),
        "gamma": lambda: random.gamma(4, 1 / 4, size),
        "lognormal": lambda: random.lognormal(-(0.5**2) / 2, 0.5, size),
        "heavy lognormal": lambda: random.lognormal(-(0.8**2) / 2, 0.8, size),
    }[kind]()
    return np.asarray(np.tile(SCALES, units // DOMAINS)[:, None] * noise, dtype=np.float64)


def misses(low: Array, high: Array, truth: float) -> Array:
    return np.asarray((low > truth) | (high < truth))
