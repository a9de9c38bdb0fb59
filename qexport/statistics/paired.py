"""The test for correct and wrong answers of two models to the same items."""

from __future__ import annotations

from scipy.special import bdtr


def mcnemar(only_reference: int, only_artifact: int) -> float:
    """The two-sided p-value of McNemar's exact test: do two models answer the same items equally well?

    If they do, each of the b + c items that only one model answers correctly is the reference's with probability 1/2:
    p = min(1, 2 P(X <= min(b, c))), X binomial(b + c, 1/2). (McNemar 1947, with the binomial in place of chi-squared.)

    The difference of the accuracies with its interval is `stratified_mean` of +1, 0 and -1 per item, with `trials` 1.

    Args:
        only_reference: b, the number of items that only the reference answers correctly.
        only_artifact: c, the number that only the artifact answers correctly.

    Raises:
        ValueError: a number is negative.
    """
    if only_reference < 0 or only_artifact < 0:
        raise ValueError(f"negative counts: {only_reference} and {only_artifact}")
    discordant = only_reference + only_artifact
    if not discordant:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_reference, only_artifact), discordant, 0.5)))
