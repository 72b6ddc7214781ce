"""Claim: the number of iterations follows the distribution that the configuration names, and impossible ones are refused."""

import math
from typing import Any

import pytest
import torch

from mull.training.objectives.iterations import IterationSampling

DRAWS = 20_000


def draws(**options: Any) -> torch.Tensor:
    sampling = IterationSampling(**options)
    return torch.tensor([sampling.sample() for _ in range(DRAWS)], dtype=torch.float64)


def test_uniform_reaches_both_ends_equally_often() -> None:
    counts = draws(kind="uniform", minimum=2, maximum=5).long().bincount(minlength=6)
    assert counts[:2].sum() == 0
    expected = DRAWS / 4
    chi_square = float(((counts[2:] - expected) ** 2 / expected).sum())
    assert chi_square < 16.3, "p < 0.001 with three degrees of freedom"


@pytest.mark.parametrize("mean", [3.0, 8.0])
def test_poisson_lognormal_has_the_moments_of_the_formula(mean: float) -> None:
    sample = draws(kind="poisson_lognormal", mean=mean, maximum=1000)
    # 1 + Poisson(rate), rate log-normal with that mean: variance E[rate] + Var[rate].
    variance = mean + mean**2 * (math.exp(0.25) - 1)
    assert float(sample.mean()) == pytest.approx(mean + 1, abs=5 * math.sqrt(variance / DRAWS))
    assert float(sample.var()) == pytest.approx(variance, rel=0.15)
    assert sample.min() == 1


def test_poisson_lognormal_is_clamped() -> None:
    sample = draws(kind="poisson_lognormal", mean=8.0, maximum=6)
    assert sample.max() == 6
    assert sample.min() >= 1


def test_draws_come_from_the_global_generator() -> None:
    for options in ({"kind": "uniform"}, {"kind": "poisson_lognormal", "mean": 40.0}):
        sampling = IterationSampling(maximum=1000, **options)
        torch.manual_seed(4)
        first = [sampling.sample() for _ in range(5)]
        torch.manual_seed(4)
        assert [sampling.sample() for _ in range(5)] == first


def test_fixed_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert IterationSampling(maximum=4).sample() == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_backprop_never_exceeds_what_runs() -> None:
    sampling = IterationSampling(kind="uniform", maximum=5, backprop_iterations=3)
    assert [sampling.backprop(k) for k in (1, 3, 5)] == [1, 3, 3]
    assert IterationSampling(maximum=5).backprop(5) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximum": 0}, "greater than or equal to 1"),
        ({"maximum": 4, "backprop_iterations": 0}, "greater than or equal to 1"),
        ({"maximum": 4, "backprop_iterations": 5}, r"\[1, maximum=4\]"),
        ({"maximum": 4, "minimum": 2}, "kind='uniform' only"),
        ({"kind": "uniform", "maximum": 4, "minimum": 5}, "must not exceed maximum=4"),
        ({"kind": "uniform", "maximum": 4, "mean": 2.0}, "take none"),
        ({"kind": "poisson_lognormal", "maximum": 4}, "needs a mean"),
        ({"maximum": 4, "iterations": 2}, "iterations"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IterationSampling(**options)
