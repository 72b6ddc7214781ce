"""A looped model learns to follow one edge per iteration, on three seeds: the demo's chain task at full size.

Measured on three seeds (docs/papers/etd.md); the bounds are those that the demo claims.
"""

from pathlib import Path

import pytest
import torch

from mull.app.demo.chain import Chain
from mull.app.demo.chapter import Bench


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_rises_with_every_iteration(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    chain = Chain.train(Bench(tmp_path, seed))
    trained = range(1, 6)

    def mean_of_trained_hops(iterations: int) -> float:
        return sum(chain.by_hops[hops][iterations] for hops in trained) / len(trained)

    assert mean_of_trained_hops(5) >= 0.98
    assert mean_of_trained_hops(1) <= 0.35
    assert chain.overall[1] <= 0.35
    for fewer, more in zip(range(1, 5), range(2, 6), strict=True):
        assert chain.overall[more] > chain.overall[fewer]
    assert chain.single_pass <= 0.6, "the same parameters in one pass guess between two roots"
