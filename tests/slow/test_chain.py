"""A looped model learns to follow one edge per iteration, on three seeds: the demo's chain task at full size.

Measured on three seeds (docs/papers/etd.md); the bounds are those that the demo claims.
"""

from pathlib import Path

import pytest
import torch

from mull.app.demo.demo import DemoSize, chain_story


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_rises_with_every_iteration(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    story = chain_story(tmp_path, seed, DemoSize())
    trained = range(1, 6)

    def mean_of_trained_hops(iterations: int) -> float:
        return sum(story.by_hops[hops][iterations] for hops in trained) / len(trained)

    assert mean_of_trained_hops(5) >= 0.98
    assert mean_of_trained_hops(1) <= 0.35
    assert story.overall[1] <= 0.35
    for fewer, more in zip(range(1, 5), range(2, 6), strict=True):
        assert story.overall[more] > story.overall[fewer]
    assert story.single_pass <= 0.6, "the same parameters in one pass guess between two roots"
