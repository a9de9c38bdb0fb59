"""How often the gates of `verify.baseline` fail between sound artifacts of one recipe, calibrated with other seeds.

Every artifact is taken as the release for every other one, on real text. The artifacts come from runs that differ in
nothing but the seed, all windows measured:

    for n in 1 2 3 4 5; do
      qexport run recipes/gptq-4bit.yaml quantize.calibration.seed=$n verify.windows=64 output=out/seeds/$n
    done
    python benchmarks/baseline_seeds.py recipes/gptq-4bit.yaml out/seeds/*/safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Final

import numpy as np

from qexport.artifact.agreement import read_report
from qexport.artifact.report import Report
from qexport.gates import GatesFile
from qexport.gates.baseline import PAIRED, baseline_limits
from qexport.gates.deciding import decide
from qexport.loading.small_files import open_tokenizer
from qexport.pipeline import plan
from qexport.pipeline.baseline import read_baseline
from qexport.pipeline.texts import read_evaluation
from qexport.recipe import Recipe, load_recipe
from qexport.statistics.means import PLANNED_UNITS
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.document_sums import baseline_figures
from qexport.verifying.units import document_units

VERDICTS: Final = ("pass", "undecided", "fail")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe of all artifacts")
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--margin", type=float, default=0.25, help="verify.baseline_margin")
    chosen = parser.parse_args(arguments)
    reports = {path: read_report(path) for path in chosen.artifacts}
    windows = min(len(report.document_sums.windows) for report in reports.values() if report.document_sums)
    held_out = _held_out(load_recipe(chosen.recipe, ()), windows)
    settings = VerifySettings(text="", sequence_length=held_out.input_ids.shape[1], baseline_margin=chosen.margin)
    found = [_compared(settings, release, reports[own], held_out) for release, own in permutations(reports, 2)]
    drift = np.array([_mean_kl(report) for report in reports.values()])
    print(f"{len(reports)} artifacts, mean KL {drift.mean():.4f} nats, from {drift.min():.4f} to {drift.max():.4f}")
    print("\n| gate | passed | undecided | failed | worst, of its limit |\n|---|---|---|---|---|")
    for name in PAIRED:
        verdicts = [pair[name][0] for pair in found]
        shares = (f"{100 * verdicts.count(verdict) / len(found):.0f} %" for verdict in VERDICTS)
        print(f"| {name} | {' | '.join(shares)} | {max(pair[name][1] for pair in found):.2f} |")
    print(f"\n{len(found)} pairs, {windows} windows")


def _mean_kl(report: Report) -> float:
    assert report.document_sums is not None
    return sum(report.document_sums.kl) / sum(report.document_sums.tokens)


def _held_out(recipe: Recipe, windows: int) -> HeldOut:
    """The first windows of the recipe's text, with their documents."""
    assert recipe.verify is not None
    settings, checkpoint = recipe.verify.model_copy(update={"max_windows": windows}), plan(recipe).merged.checkpoint
    return read_evaluation(settings, open_tokenizer(checkpoint), checkpoint).held_out


def _compared(settings: VerifySettings, release: Path, own: Report, held_out: HeldOut) -> dict[str, tuple[str, float]]:
    """By gate, its verdict and the measured difference as a share of the limit."""
    baseline = read_baseline(settings.model_copy(update={"baseline": str(release)}))
    assert baseline is not None
    assert own.document_sums is not None
    limits, _ = baseline_limits(baseline.record, {}, GatesFile())
    units = document_units(held_out, len(held_out.input_ids), PLANNED_UNITS)
    figures = baseline_figures(own.document_sums, baseline, units)
    gates = {gate.name: gate for gate in decide(limits, figures, [], [])}
    return {name: (gate.verdict, _share(name, gate.value, gate.limit)) for name, gate in gates.items()}


def _share(name: str, value: float | None, limit: float | None) -> float:
    assert value is not None
    assert limit is not None
    if name == "baseline_perplexity_ratio":
        return float(np.log(value) / np.log(limit))
    return value / limit


if __name__ == "__main__":
    main()
