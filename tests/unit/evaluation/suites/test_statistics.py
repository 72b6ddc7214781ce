"""Pass@k equals the mean over all subsets of samples, and intervals contain the truth as often as they state."""

import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest

from mull.evaluation.suites import statistics
from mull.evaluation.suites.statistics import best_score, compare, exact_interval, mcnemar, pass_at_k, score


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-14)


def test_pass_at_k_does_not_overflow() -> None:
    exact = 1 - comb(900, 100) / comb(1000, 100)  # of whole numbers
    assert pass_at_k(1000, 100, 100) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(200, 0, 100) == 0
    assert pass_at_k(200, 101, 100) == 1


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (5, 0, 10, "pass@10 cannot be estimated from 5 samples per problem: draw at least 10, or leave k=10 out"),
        (5, 0, 0, "k=0 must be at least 1"),
        (5, 6, 1, "c=6 must be at least 0 and at most 5"),
    ],
)
def test_pass_at_k_refuses(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def named(values: np.ndarray) -> dict[str, tuple[float, float]]:
    return {f"p{index:04}": (float(value), 1.0) for index, value in enumerate(values)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "mean", "samples"), [(164, 0.3, 1), (164, 0.02, 1), (164, 0.3, 8), (50, 0.95, 1), (30, 0.5, 4)]
)
def test_intervals_cover_the_truth_as_often_as_they_state(
    n: int, mean: float, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems are drawn from a population whose mean is known; 300 intervals of 95 % miss it 15 +- 4 times."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, covered, trials = np.random.default_rng(1), 0, 300
    for trial in range(trials):
        rates = rng.beta(mean, 1 - mean, n) if samples > 1 else np.full(n, mean)
        low, high = score(named(rng.binomial(samples, rates) / samples), seed=trial)[1:3]
        covered += low <= mean <= high
    assert covered / trials >= 0.92
    if n * min(mean, 1 - mean) > 20:  # where the bootstrap is used, it is not too wide either
        assert covered / trials <= 0.985


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (3, 164), (164, 164)])
def test_few_right_or_wrong_problems_have_an_exact_interval(right: int, n: int) -> None:
    found = score(named(np.array([1.0] * right + [0.0] * (n - right))))
    exact = binomtest(right, n).proportion_ci(method="exact")
    assert found.low == pytest.approx(exact.low, abs=1e-12)
    assert found.high == pytest.approx(exact.high, abs=1e-12)
    assert found.low < found.high


def test_many_right_and_wrong_problems_are_resampled() -> None:
    """The ends are scores of resamples, which are whole numbers of problems."""
    right = {str(n): (float(n % 2), 1.0) for n in range(60)}
    other = {str(n): (float(n % 3 == 0), 1.0) for n in range(60)}
    found = score(right)
    differences = compare(right, other).difference
    for end in (found.low, found.high, differences.low, differences.high):
        assert end is not None
        assert end * 120 == pytest.approx(round(end * 120))  # a quantile may lie in the middle of two


def test_exact_intervals_are_those_of_scipy_and_grow_between_whole_numbers() -> None:
    highs = [exact_interval(successes, 40)[1] for successes in np.arange(0, 40, 0.25)]
    assert highs == sorted(highs)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (3, 9), (20, 4), (7, 7)])
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-12)


def test_a_paired_comparison_is_narrower_than_two_intervals_and_finds_a_real_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    first = (hard < 0.5).astype(float)
    second = (hard < 0.56).astype(float)  # solves all that the first solves, and a little more
    found = compare(named(first), named(second))
    apart = score(named(second)).high - score(named(second)).low
    assert found.difference.high - found.difference.low < apart / 1.5
    assert found.difference.low > 0
    assert (found.only_first, found.only_second) == (0, int((second - first).sum()))
    assert found.p_value is not None
    assert found.p_value < 0.001
    back = compare(named(second), named(first))
    assert back.difference.value == -found.difference.value
    assert back.p_value == found.p_value


@pytest.mark.slow
@pytest.mark.parametrize(("n", "both", "differ"), [(164, 0.3, 0.1), (164, 0.3, 0.02), (40, 0.5, 0.3)])
def test_paired_intervals_cover_no_difference(
    n: int, both: float, differ: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, covered, trials = np.random.default_rng(2), 0, 300
    for trial in range(trials):
        kind = rng.choice(4, n, p=[both, 1 - both - differ, differ / 2, differ / 2])
        first, second = (kind == 0) | (kind == 2), (kind == 0) | (kind == 3)
        found = compare(named(first.astype(float)), named(second.astype(float)), seed=trial)
        covered += found.difference.low <= 0 <= found.difference.high
    assert covered / trials >= 0.92


def test_only_common_problems_are_compared_and_order_does_not_matter() -> None:
    first = {"a": (1.0, 1.0), "b": (0.0, 1.0), "c": (1.0, 1.0)}
    second = {"d": (1.0, 1.0), "c": (0.0, 1.0), "b": (0.0, 1.0)}
    assert compare(first, second).difference.n == 2
    with pytest.raises(ValueError, match="no problem in common"):
        compare({"a": (1.0, 1.0)}, {"b": (1.0, 1.0)})
    values = named(np.random.default_rng(0).integers(0, 2, 100).astype(float))
    assert score(values) == score(dict(reversed(values.items())))


def test_a_ratio_weighs_problems_by_their_size() -> None:
    """A loss per token: 10 tokens at 1 nat and 90 at 2 are 1.9, not 1.5."""
    found = score({"short": (10.0, 10.0), "long": (180.0, 90.0)}, proportion=False)
    assert found.value == pytest.approx(1.9)


def test_few_problems_give_wide_intervals_and_one_gives_none() -> None:
    """Student's interval over 6 problems covers; the bootstrap over them would miss the truth about twice as often."""
    rng = np.random.default_rng(5)
    covered, covered_of_differences = 0, 0
    for _ in range(400):
        tokens = rng.integers(50, 200, 6).astype(float)
        losses, others = (tokens * (2 + rng.normal(0, 0.3, 6)) for _ in range(2))
        sums, other = ({str(i): (loss[i], tokens[i]) for i in range(6)} for loss in (losses, others))
        found, difference = score(sums, proportion=False), compare(sums, other).difference
        covered += found.low <= 2 <= found.high
        covered_of_differences += difference.low <= 0 <= difference.high
    assert 360 <= covered < 395, covered
    assert 360 <= covered_of_differences < 395, covered_of_differences
    one = {"a": (7.0, 5.0)}
    assert score(one, proportion=False) == (1.4, None, None, 1)
    assert compare(one, {"a": (8.0, 5.0)}).difference[1:3] == (None, None)
    with pytest.raises(ValueError, match="no problem to score"):
        score({"a": (0.0, 0.0)})


def test_a_share_that_is_never_right_is_not_certain() -> None:
    found = score({str(i): (0.0, 100.0) for i in range(90)})
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 90))


def test_the_best_of_several_is_an_oracle_and_its_interval_is_not_below_that_of_one() -> None:
    rng = np.random.default_rng(3)
    series = [named(rng.integers(0, 2, 100).astype(float)) for _ in range(4)]
    alone = [score(each) for each in series]
    found = best_score(series)
    assert found.value == max(each.value for each in alone)
    assert found.low >= max(each.low for each in alone) - 1e-9


def test_an_interval_covers_in_a_short_simulation() -> None:
    """The slow tests above, in small: 40 intervals of 95 % miss the truth at most 6 times (probability of more: 0.3 %)."""
    rng = np.random.default_rng(4)
    found = [score(named(rng.binomial(1, 0.4, 60).astype(float)), seed=trial) for trial in range(40)]
    assert sum(each.low <= 0.4 <= each.high for each in found) >= 34
