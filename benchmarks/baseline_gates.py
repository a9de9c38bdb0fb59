"""How often the gates of `verify.baseline` pass, fail and stay open, by how much worse the artifact truly is.

Tokens of a release and of an artifact are drawn: a document's and a token's difficulty, which both share, and what each
makes of it by itself. The artifact's expected drift is a multiple of the release's, by the KL divergence; shares of
changed tokens grow with its square root. Windows of 512 tokens are looked at after 24, 48 and 64 of them, as by the
defaults of `verify`, until every gate is decided.

    python benchmarks/baseline_gates.py
    python benchmarks/baseline_gates.py --runs 50 --margin 0.1
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.artifact import Identity
from qexport.artifact.baseline import BaselineRecord
from qexport.artifact.figures import Verdict, overall
from qexport.gates import GatesFile
from qexport.gates.baseline import PAIRED, baseline_limits
from qexport.gates.deciding import decide
from qexport.statistics.means import PLANNED_UNITS
from qexport.text.windows import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.document_sums import Baseline, baseline_figures, document_sums
from qexport.verifying.units import document_units

LENGTH: Final = 512
LOOKS: Final = (24, 48, 64)
WORSE: Final = (1.0, 1.05, 1.1, 1.25, 1.5, 2.0)
"""The artifact's drift as a multiple of the release's."""

_BETWEEN: Final = 0.5
_WITHIN: Final = 0.7
_OWN_OF_DOCUMENT: Final = 0.1
_OWN_OF_TOKEN: Final = 0.55
"""Standard deviations of logarithms: of the documents' and the tokens' difficulty, and of what each artifact adds.
Together they give the median (0.58 of the mean) and the 99 % quantile (6.3 times) of SmolLM2-135M at 4 bits."""


@dataclass(frozen=True)
class Release:
    """A release and the text that it is measured on.

    Attributes:
        mean_kl: in nats.
        changed: share of tokens whose likeliest token changes.
        decisive: share of these that are decisive flips.
        spread: the standard deviation of the logarithm of a document's length, whose median is 0.9 windows.
    """

    mean_kl: float
    changed: float
    decisive: float
    spread: float = 0.4


RELEASES: Final = {
    "4 bits, 135M": Release(0.16, 0.21, 0.3),
    "the same, documents of very different lengths": Release(0.16, 0.21, 0.3, spread=1.0),
    "8 bits": Release(0.002, 0.025, 0.05),
}


def simulate(release: Release, worse: float, margin: float, runs: int, seed: int) -> Counter[Verdict]:
    """The verdict of all gates together in so many measurements."""
    random = np.random.default_rng(seed)
    return Counter(overall(_verdicts(release, worse, margin, random).values()) for _ in range(runs))


def _verdicts(release: Release, worse: float, margin: float, random: np.random.Generator) -> dict[str, Verdict]:
    text = _text(release.spread, random)
    hard = _difficulty(text, random)
    sums = document_sums(_tokens(release, hard, text, random), text)
    drifted = replace(release, mean_kl=release.mean_kl * worse, changed=release.changed * worse**0.5)
    artifact = _tokens(drifted, hard, text, random)
    identity = Identity(base_sha256="", adapter_sha256=None, text_sha256="", prompts_sha256=None, tokenizer_sha256="",
                        template_sha256=None)  # fmt: skip
    tokens = sum(sums.tokens)
    record = BaselineRecord(
        name="release", method="", report_sha256="", base_sha256="", adapter_sha256=None, dtype="bfloat16",
        margin=margin, mean_kl=sum(sums.kl) / tokens, perplexity_ratio=1.0,
        top1_agreement=1 - sum(sums.changed) / tokens, decisive_flips=sum(sums.decisive_flips) / tokens,
    )  # fmt: skip
    limits, _ = baseline_limits(record, {}, GatesFile())
    found: dict[str, Verdict] = {}
    for windows in LOOKS:
        seen = TokenFigures(**{name: values[:windows] for name, values in vars(artifact).items()})
        units = document_units(text, windows, PLANNED_UNITS)
        figures = baseline_figures(document_sums(seen, text), Baseline(record, sums, identity), units)
        found = {gate.name: gate.verdict for gate in decide(limits, figures, [], [])}
        if "undecided" not in found.values():
            break
    assert list(found) == list(PAIRED)
    return found


def _text(spread: float, random: np.random.Generator) -> HeldOut:
    numbers = list[int]()
    while len(numbers) < LOOKS[-1] * LENGTH:
        length = max(2, round(0.9 * LENGTH * np.exp(random.normal() * spread)))
        numbers += [numbers[-1] + 1 if numbers else 0] * length
    owners = np.reshape(numbers[: LOOKS[-1] * LENGTH], (LOOKS[-1], LENGTH))
    ids = torch.from_numpy(random.integers(0, 1 << 30, owners.shape))
    return HeldOut(ids, (None,) * len(ids), "", "", documents=torch.from_numpy(owners))


def _difficulty(text: HeldOut, random: np.random.Generator) -> NDArray[np.float64]:
    """Of each predicted token, with a mean of 1."""
    assert text.documents is not None
    owners = text.documents[:, 1:].numpy()
    of_document = random.normal(size=int(owners.max()) + 1) * _BETWEEN - _BETWEEN**2 / 2
    of_token = random.normal(size=owners.shape) * _WITHIN - _WITHIN**2 / 2
    return np.asarray(np.exp(of_document[owners] + of_token))


def _tokens(
    release: Release,
    hard: NDArray[np.float64],
    text: HeldOut,
    random: np.random.Generator,
) -> TokenFigures:
    assert text.documents is not None
    owners = text.documents[:, 1:].numpy()
    own = random.normal(size=int(owners.max()) + 1)[owners] * _OWN_OF_DOCUMENT - _OWN_OF_DOCUMENT**2 / 2
    own += random.normal(size=hard.shape) * _OWN_OF_TOKEN - _OWN_OF_TOKEN**2 / 2
    kl = release.mean_kl * hard * np.exp(own)
    root = np.sqrt(hard)
    changed = random.random(hard.shape) < release.changed * root / root.mean()

    def tensor(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values)

    return TokenFigures(
        reference_nll=tensor(np.zeros(hard.shape)),
        artifact_nll=tensor(random.normal(kl, np.sqrt(2 * kl))),
        kl=tensor(kl),
        margin=tensor((random.random(hard.shape) < release.decisive).astype(np.float64)),
        reference_top=torch.zeros(hard.shape, dtype=torch.int32),
        artifact_top=torch.from_numpy(changed.astype(np.int32)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="measurements of each pair")
    parser.add_argument("--margin", type=float, default=0.25, help="verify.baseline_margin")
    chosen = parser.parse_args(arguments)
    print("| release | drift of the artifact / release | passed | undecided | failed |")
    print("|---|---|---|---|---|")
    for name, release in RELEASES.items():
        for worse in WORSE:
            found = simulate(release, worse, chosen.margin, chosen.runs, seed=1)
            shares = (100 * found[verdict] / chosen.runs for verdict in ("pass", "undecided", "fail"))
            print(f"| {name} | {worse:g} | {' | '.join(f'{share:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
