"""FLOPs and bytes of layers, and what the machine can do."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mull.layers.experts import LoRABranches
from mull.model.causal_lm import MullForCausalLM
from mull.model.memory import head_width
from mull.runtime.timing import fastest, measured_peak

DELTA_RULE_CHUNK = 64
"""Tokens that a gated delta rule processes at once, in transformers and in flash-linear-attention."""

STREAMED_BYTES = 256 * 2**20
"""Size of the weights whose reading is timed: larger than the last-level cache of common CPUs and GPUs."""


def whole_layer(model: MullForCausalLM, number: int) -> nn.Module:
    """A decoder layer, together with the gate of its attention."""
    layer, gates = model.model.layers[number], model.model.attention_gates
    return layer if gates is None or str(number) not in gates else nn.ModuleList([layer, gates[str(number)]])


def products(module: nn.Module, config: Any) -> Iterator[tuple[nn.Module, nn.Parameter, float]]:
    """Parameters that tokens are multiplied with, each with the part that owns it and the share of it that one token uses.

    The share is 1 for matrices and convolution kernels, ``top_k / experts`` for stacks of routed experts, and ``1 / experts`` for
    those of LoRA experts.
    """
    # torch.utils.flop_counter could count instead of these formulas, and the tests compare with it. But it ignores sliding
    # windows, does not know the grouped product of experts, and counts short rows of a delta rule as a whole chunk.
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.ndim == 2 or isinstance(part, nn.Conv1d):
                yield part, parameter, 1.0
            elif isinstance(part, LoRABranches):
                yield part, parameter, 1 / len(parameter)
            elif parameter.ndim == 3:
                yield part, parameter, config.num_experts_per_tok / parameter.shape[0]


def product_flops(module: nn.Module, config: Any) -> float:
    """FLOPs per token of all products with parameters."""
    return 2 * sum(parameter.numel() * share for _, parameter, share in products(module, config))


def mixing_flops(kind: str, config: Any, length: int) -> float:
    """FLOPs per token of what mixes tokens in a layer of this kind: attention to the visible keys, or the delta rule."""
    if kind == "linear_attention":
        key, value = config.linear_key_head_dim, config.linear_value_head_dim
        per_head = DELTA_RULE_CHUNK * (4 * key + 2 * value) + 6 * key * value
        return float(config.linear_num_value_heads * per_head)
    return float(4 * config.num_attention_heads * head_width(config) * visible_keys(kind, config, length))


def visible_keys(kind: str, config: Any, length: int) -> int:
    """Keys that the last token of a row of `length` tokens attends to."""
    return min(length, config.sliding_window) if kind == "sliding_attention" else length


@dataclass(frozen=True)
class Machine:
    """The most that a device does per second in one dtype."""

    flops: float
    """FLOP per second of a product of large matrices; a multiplication and an addition are two."""

    bandwidth: float
    """Bytes of weights that a product with a single row reads per second."""

    def seconds(self, n_bytes: float, n_flops: float) -> float:
        """Least time to read and to compute, which overlap."""
        return max(n_bytes / self.bandwidth, n_flops / self.flops)


def measure_machine(device: torch.device | str, dtype: torch.dtype, streamed_bytes: int = STREAMED_BYTES) -> Machine:
    """Time a product of large matrices, and products of a single row with many weights; takes about a second.

    Args:
        device: A CPU is measured with torch's current number of threads.
        dtype: Of the weights.
        streamed_bytes: Size of the weights that are read one after the other. Give the size of a small model to measure the
            cache that will contain it.
    """
    device = torch.device(device)
    n_columns = 1024
    # A few matrices, as a model has them.
    n_rows = max(streamed_bytes // (8 * n_columns * dtype.itemsize), 1)
    weights = [torch.randn(n_rows, n_columns, device=device).to(dtype) for _ in range(8)]
    row = torch.randn(1, n_columns, device=device).to(dtype)
    seconds = fastest(lambda: [F.linear(row, weight) for weight in weights], device)
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return Machine(flops=measured_peak(device, dtype), bandwidth=n_bytes / seconds)
