"""FLOPs and bytes of layers, and what the machine can do."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WARM_UP, REPETITIONS = 2, 7
"""Runs of a product before it is timed, and runs that are timed; the fastest counts."""

DELTA_RULE_CHUNK = 64
"""Tokens that a gated delta rule handles at once, in transformers and in flash-linear-attention."""


def active_matrices(module: nn.Module, config: Any) -> float:
    """Entries of the matrices, convolution kernels and chosen experts that one token meets."""
    total = 0.0
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.ndim == 2 or isinstance(part, nn.Conv1d):
                total += parameter.numel()
            elif parameter.ndim == 3:
                total += parameter.numel() * config.num_experts_per_tok / parameter.shape[0]
    return total


def mixing_flops(kind: str, config: Any, length: int) -> float:
    """FLOPs per token of what mixes tokens in a layer of this kind: attention over the keys it sees, or the delta rule."""
    if kind == "linear_attention":
        key, value = config.linear_key_head_dim, config.linear_value_head_dim
        per_head = DELTA_RULE_CHUNK * (4 * key + 2 * value) + 6 * key * value
        return float(config.linear_num_value_heads * per_head)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(4 * config.num_attention_heads * width * visible_keys(kind, config, length))


def visible_keys(kind: str, config: Any, length: int) -> int:
    """Keys that the last token of a row of `length` tokens attends to."""
    return min(length, config.sliding_window) if kind == "sliding_attention" else length


STREAMED_BYTES = 256 * 2**20
"""Size of the weights whose reading is timed: larger than the last-level cache of common CPUs and GPUs."""


PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square matrices whose product is timed; 1024 on other devices."""


@dataclass(frozen=True)
class Machine:
    """What a device does per second at best, in one dtype."""

    flops: float
    """Floating-point operations of a product of large matrices, per second; a multiplication and an addition are two."""

    bandwidth: float
    """Bytes of weights that a product with a single row reads, per second."""

    def seconds(self, n_bytes: float, n_flops: float) -> float:
        """Time to read and compute at once."""
        return max(n_bytes / self.bandwidth, n_flops / self.flops)


def measure_machine(device: torch.device | str, dtype: torch.dtype, streamed_bytes: int = STREAMED_BYTES) -> Machine:
    """Time a large matrix product, and the reading of weights by a product with a single row; takes about a second.

    Args:
        device: Where; on a CPU with torch's number of threads.
        dtype: Of the weights.
        streamed_bytes: Size of the weights that are read one after the other. Give the size of a small model to measure the
            cache that will hold it.
    """
    device = torch.device(device)
    size = PRODUCT_SIZE.get(device.type, 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_seconds = _fastest(lambda: left @ right, device)
    n_columns = 1024
    # A few matrices, as a model has them.
    n_rows = max(streamed_bytes // (8 * n_columns * left.element_size()), 1)
    weights = [torch.randn(n_rows, n_columns, device=device).to(dtype) for _ in range(8)]
    row = torch.randn(1, n_columns, device=device).to(dtype)
    stream_seconds = _fastest(lambda: [F.linear(row, weight) for weight in weights], device)
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return Machine(flops=2 * size**3 / product_seconds, bandwidth=n_bytes / stream_seconds)


def _fastest(call: Callable[[], Tensor | list[Tensor]], device: torch.device) -> float:
    """Seconds of the fastest of some runs."""
    found = []
    for _ in range(WARM_UP + REPETITIONS):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - begin)
    return min(found[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
