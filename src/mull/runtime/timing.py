"""Timing of single operations on a device."""

import time
from collections.abc import Callable

import torch

WARM_UP, REPETITIONS = 2, 7


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(
    call: Callable[[], object], device: torch.device, warm_up: int = WARM_UP, repetitions: int = REPETITIONS
) -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    seconds = []
    for _ in range(warm_up + repetitions):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[warm_up:])


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two large matrices; a multiplication and an addition are two FLOPs."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: left @ right, device)
