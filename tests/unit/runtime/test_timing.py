"""Claim: the time of an operation is that of its fastest run, and slow first runs do not count."""

import time

import pytest
import torch

from mull.runtime.timing import REPETITIONS, WARM_UP, fastest

CPU = torch.device("cpu")


def test_the_fastest_run_after_the_warm_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [0.5] * WARM_UP + [
        4.0,
        3.0,
        *[5.0] * (REPETITIONS - 2),
    ]  # the warm-up is fastest here, and must not count
    clock = 0.0
    runs = iter(durations)

    def call() -> None:
        nonlocal clock
        clock += next(runs)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert fastest(call, CPU) == 3.0
    assert next(runs, None) is None
