"""Pass@k, intervals over problems, and the comparison of two models on the same problems.

Every score is a ratio of two sums over problems: for pass@k the second sum counts problems, for a loss it counts tokens. Problems
are resampled whole, because samples of one problem, and tokens of one text, are not independent.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from mull.runtime.arguments import require_count

LEVEL = 0.95
"""Coverage of every interval."""

RESAMPLES = 4000
"""Resamples of a bootstrap: the ends of an interval then vary by about 2 % of its width from seed to seed."""

FEW = 10
"""Below so many right, wrong, or all problems the percentile bootstrap is too narrow, and `score` takes another interval."""

CHUNK = 250
"""Resamples at a time, which bounds the memory."""

Sums = tuple[float, float]
"""What one problem adds to the two sums of a score."""


class Score(NamedTuple):
    """A score with its interval."""

    value: float
    low: float | None
    """Lower end of the interval; None, like `high`, where one problem says nothing about others."""

    high: float | None
    n: int
    """Number of problems."""


class Comparison(NamedTuple):
    """The difference of a second model from a first one, on the problems that both have."""

    first: float
    second: float
    difference: Score
    """Second minus first."""

    only_first: int | None
    """Problems that only the first model solved; None for scores that are not right or wrong."""

    only_second: int | None
    p_value: float | None
    """McNemar's exact test: probability of counts at least as unequal if both models were equally good."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from c right ones among n.

    ``1 - C(n - c, k) / C(n, k)``, as the product of Chen et al. 2021 (arXiv:2107.03374, section 2.1), which does not overflow.

    Raises:
        ValueError: k is below 1 or above n, or c is not between 0 and n.
    """
    require_count("k", k, 1)
    if k > n:
        raise ValueError(
            f"pass@{k} cannot be estimated from {n} samples per problem: draw at least {k}, or leave k={k} out."
        )
    require_count("c", c, 0, n)
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def score(values: Mapping[str, Sums], *, seed: int = 0, proportion: bool = True) -> Score:
    """Ratio of sums over problems, with the percentile bootstrap over problems as its interval.

    Where fewer than `FEW` problems are right, or wrong, the bootstrap is too narrow, and empty if all problems agree. There the
    interval is Clopper and Pearson's exact one, with the value times the number of problems as the number of successes; it is too
    wide rather than too narrow. Of other scores with fewer than `FEW` problems, it is Student's, with the standard error of a
    ratio; one problem gives none.

    Args:
        values: Sums of each problem. Names are sorted, so their order does not matter.
        seed: Of the resampling.
        proportion: Each first sum lies between 0 and the second one, as for right ones among so many.

    Raises:
        ValueError: no problems, or nothing counted in any.
    """
    sums = np.array([values[name] for name in sorted(values)], dtype=np.float64).reshape(-1, 2)
    n, (right, of) = len(sums), sums.sum(0)
    if not of:
        raise ValueError("There is no problem to score.")
    value = float(right / of)
    if proportion and _few(sums):
        return Score(value, *exact_interval(value * n, n), n)
    if n < FEW and not proportion:
        return Score(value, *student_interval(value, (sums[:, 0] - value * sums[:, 1]) / of), n)
    low, high = np.quantile(resampled(sums[None], seed)[0], _tails())
    return Score(value, float(low), float(high), n)


def _few(sums: np.ndarray) -> bool:
    """Whether the bootstrap knows too few right, or wrong, problems."""
    right, wrong = sums[:, 0], sums[:, 1] - sums[:, 0]
    if (sums[:, 1] == 1).all():
        return bool(min(right.sum(), wrong.sum()) < FEW)
    return bool(min(np.count_nonzero(right), np.count_nonzero(wrong)) < FEW)


def student_interval(value: float, residuals: np.ndarray) -> tuple[float | None, float | None]:
    """Student's interval of a ratio of sums, or of a difference of such; None for one problem.

    Args:
        value: Of the ratio.
        residuals: What each problem adds to its error, ``(a - value * b) / sum(b)`` for its sums a and b (delta method).
    """
    n = len(residuals)
    if n == 1:
        return None, None
    half = special.stdtrit(n - 1, _tails()[1]) * float(np.sqrt((residuals**2).sum() * n / (n - 1)))
    return value - half, value + half


def best_score(values: Sequence[Mapping[str, Sums]], *, seed: int = 0) -> Score:
    """The largest of several scores on the same problems, such as at several temperatures, with its interval.

    The largest is looked up again in each resample, so the interval includes that the choice depends on the problems. The value
    is still an oracle's: whoever chose the temperature saw the test problems.
    """
    names = sorted(values[0])
    sums = np.array([[each[name] for name in names] for each in values], dtype=np.float64)
    ratios = sums[..., 0].sum(1) / sums[..., 1].sum(1)
    best = int(ratios.argmax())
    alone = score(values[best], seed=seed)
    right = sums[best, :, 0].sum()
    if min(right, len(names) - right) < FEW:
        return alone
    low, high = np.quantile(resampled(sums, seed).max(0), _tails())
    return Score(alone.value, float(low), float(high), alone.n)


def exact_interval(successes: float, n: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability (Biometrika 26, 1934), with beta quantiles, so for fractions, too."""
    below, above = _tails()
    low = float(special.betaincinv(successes, n - successes + 1, below)) if successes > 0 else 0.0
    high = float(special.betaincinv(successes + 1, n - successes, above)) if successes < n else 1.0
    return low, high


def resampled(sums: np.ndarray, seed: int) -> np.ndarray:
    """Ratios of sums over resampled problems, ``[series, RESAMPLES]``; every series sees the same problems.

    Args:
        sums: ``[series, problems, 2]``.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    n, found = sums.shape[1], []
    for _ in range(RESAMPLES // CHUNK):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=CHUNK)  # how often each problem is drawn
        totals = np.einsum("rp,spc->src", counts, sums)
        found.append(totals[..., 0] / totals[..., 1])
    return np.concatenate(found, axis=1)


def compare(first: Mapping[str, Sums], second: Mapping[str, Sums], *, seed: int = 0) -> Comparison:
    """Compare two models on the problems that both have, by a paired bootstrap and, for right and wrong, McNemar's exact test.

    Problems are resampled in pairs, so what makes a problem hard for both does not widen the interval.

    Args:
        first: Sums of each problem.
        second: Those of the other model.
        seed: Of the resampling.

    Raises:
        ValueError: no problem in common.
    """
    names = sorted(first.keys() & second.keys())
    if not names:
        raise ValueError("The two have no problem in common.")
    pair = np.array([[each[name] for name in names] for each in (first, second)], dtype=np.float64)
    ratios = pair[..., 0].sum(1) / pair[..., 1].sum(1)
    low, high = _paired_interval(pair, seed)
    difference = Score(float(ratios[1] - ratios[0]), low, high, len(names))
    counts = _discordant(pair)
    p_value = None if counts is None else mcnemar(*counts)
    only_first, only_second = counts or (None, None)
    return Comparison(float(ratios[0]), float(ratios[1]), difference, only_first, only_second, p_value)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test: under equality, each problem that one model alone solved is a fair coin.

    Source:
        McNemar 1947, Psychometrika 12; the exact form is the binomial test, twice the smaller tail.
    """
    n = only_first + only_second
    return min(1.0, 2 * float(special.bdtr(min(only_first, only_second), n, 0.5))) if n else 1.0


def _paired_interval(pair: np.ndarray, seed: int) -> tuple[float | None, float | None]:
    differences = pair[1, :, 0] - pair[0, :, 0]
    n, n_different = len(differences), int(np.count_nonzero(differences))
    is_proportion = bool((pair[..., 1] == 1).all() and (pair[..., 0] >= 0).all() and (pair[..., 0] <= 1).all())
    if is_proportion and n_different < FEW:
        # Each problem differs by at most 1, so the difference is between those of the exact intervals of its two sides, each at
        # half of the error.
        gains, losses = differences.clip(min=0).sum(), -differences.clip(max=0).sum()
        (gain_low, gain_high), (loss_low, loss_high) = exact_half(gains, n), exact_half(losses, n)
        return gain_low - loss_high, gain_high - loss_low
    if n < FEW and not is_proportion:
        (first, of_first), (second, of_second) = pair.sum(1)
        residuals = [
            (sums[:, 0] - value * sums[:, 1]) / of
            for sums, value, of in zip(pair, (first / of_first, second / of_second), (of_first, of_second), strict=True)
        ]
        return student_interval(second / of_second - first / of_first, residuals[1] - residuals[0])
    both = resampled(pair, seed)
    low, high = np.quantile(both[1] - both[0], _tails())
    return float(low), float(high)


def exact_half(successes: float, n: int) -> tuple[float, float]:
    """`exact_interval` at half of the error, for two intervals that have to hold together."""
    error = (1 - LEVEL) / 4
    low = float(special.betaincinv(successes, n - successes + 1, error)) if successes > 0 else 0.0
    high = float(special.betaincinv(successes + 1, n - successes, 1 - error)) if successes < n else 1.0
    return low, high


def _discordant(pair: np.ndarray) -> tuple[int, int] | None:
    if not np.isin(pair[..., 0], (0, 1)).all() or not (pair[..., 1] == 1).all():
        return None
    first, second = pair[..., 0]
    return int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
