"""Claim: from what its own programs do when they are run, a model learns what its demonstrations leave open, and not from the
same rewards in another order.

The experiment of benchmarks/program_rewards.py, three seeds; measured numbers are in docs/papers/grpo.md. The bounds leave room
around the worst of them.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mull.evaluation.sandbox import Pool, SandboxError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    try:
        Pool(1).close()
    except SandboxError as error:
        pytest.skip(str(error))
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("program_rewards", BENCHMARKS / "program_rewards.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["program_rewards"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.slow
def test_executed_rewards_raise_pass_at_1_and_shuffled_ones_do_not(benchmark: ModuleType) -> None:
    world = benchmark.World(workers=4)
    with world.reward:
        for seed in range(3):
            found = benchmark.experiment(world, seed, warmup=300, steps=40)
            print(seed, found)
            start, rewarded, shuffled = (found[name]["sampled"] for name in ("start", "rewarded", "shuffled"))
            assert start < 0.45, "imitation passes in 40 % of its answers"
            assert rewarded > start + 0.3
            assert shuffled < start + 0.04
            assert found["rewarded"]["greedy"] > 0.9
            assert found["rewarded_steps"]["timeouts"] == 0
