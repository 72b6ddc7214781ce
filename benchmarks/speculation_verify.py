"""What a pass over k + 1 tokens costs relative to one token, for `speculation.py --verify-cost`.

transformers' own layers on its static cache, one row, random weights: the shapes decide, not the values.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, StaticCache

from mull import wrap_transformer_with_etd
from mull.evaluation.cost.count import STREAMED_BYTES, measure_machine
from mull.evaluation.cost.decoding import step_seconds

WARM_UP = 3
"""Passes of each length before those that are timed: they allocate, compile and capture."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {"vocab_size": 4096, "tie_word_embeddings": True}
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "5M": {**SMALL, "hidden_size": 192, "intermediate_size": 528, "num_hidden_layers": 12},
        "20M": {**SMALL, "hidden_size": 320, "intermediate_size": 880, "num_hidden_layers": 16},
        "100M": {**SMALL, "hidden_size": 576, "intermediate_size": 1584, "num_hidden_layers": 28},
    },
    "cuda": {
        "Qwen3-0.6B": {
            **QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
        "Qwen3-8B": {
            **QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
    },
    "toy": {"toy": {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}},
}


def config_of(shape: dict[str, Any], capacity: int) -> Qwen3Config:
    heads = shape["hidden_size"] // 32
    usual = {"head_dim": 32, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return Qwen3Config(**{**usual, **shape, "max_position_embeddings": capacity})


class Pass:
    """A repeatable pass over T tokens after `context` others.

    Args:
        config: Of the model.
        dtype: Of the weights.
        device: Where it runs.
        context: Tokens in the cache.
        longest: Largest T.
        compiled: Whether to compile it, on a GPU as a CUDA graph.
    """

    def __init__(
        self, config: Qwen3Config, dtype: torch.dtype, device: str, context: int, longest: int, compiled: bool
    ) -> None:
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
        self.ids = torch.randint(config.vocab_size, (1, context + longest), device=device)
        self.cache = StaticCache(config=config, max_cache_len=context + longest)
        self.context = context
        self.forward: Callable[..., Any] = self.model.forward
        self.model(self.ids[:, :context], past_key_values=self.cache)
        if compiled:
            mode = "reduce-overhead" if device == "cuda" else "default"
            self.forward = torch.compile(self.model.forward, mode=mode, dynamic=False)

    def least_seconds(self, lengths: Iterable[int]) -> dict[int, float]:
        """Time of passes over so many tokens that only read weights, or only computed products."""
        weight = self.model.lm_head.weight
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        machine = measure_machine(weight.device, weight.dtype, min(size, STREAMED_BYTES))
        ours = wrap_transformer_with_etd(self.model, None)
        return {n: step_seconds(ours, machine, context=self.context, n_tokens=n) for n in lengths}

    def seconds(self, n_tokens: int) -> float:
        """Run it once over `n_tokens`."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        tokens = self.ids[:, self.context : self.context + n_tokens]
        started = time.perf_counter()
        self.forward(tokens, past_key_values=self.cache)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


@torch.no_grad()
def measure_verify_cost(
    device: str, shapes: str, precisions: list[str], *, context: int, longest: int, repeats: int, compile_too: bool
) -> list[dict[str, Any]]:
    """Measure and print, for each shape and precision, eager and compiled.

    Args:
        device: Where to run.
        shapes: Row of `SHAPES`.
        precisions: Of the weights.
        context: Tokens in the cache.
        longest: Largest number of tokens of a pass.
        repeats: Passes of each length, in turns with the others.
        compile_too: Also measure compiled passes.
    """
    lengths = range(1, longest + 1)
    print(f"ms per pass over 1 token at a context of {context}, and time over T tokens relative to it")
    print(f"{'shape':12} {'':5} {'':9} {'ms':>8} " + " ".join(f"T={n:<4}" for n in lengths))
    rows = []
    for name, shape in SHAPES[shapes].items():
        config = config_of(shape, context + longest)
        for precision in precisions:
            for mode in ("eager", "compiled") if compile_too else ("eager",):
                torch.compiler.reset()
                run = Pass(config, DTYPES[precision], device, context, longest, mode == "compiled")
                found = times(run, lengths, repeats)
                ms = {str(n): {"median": found[n][1], "min": found[n][0], "max": found[n][2]} for n in lengths}
                ratio = {str(n): found[n][1] / found[1][1] for n in lengths}
                least = run.least_seconds(lengths)
                predicted = {str(n): least[n] / least[1] for n in lengths}
                row = {"shape": name, "precision": precision, "mode": mode, "ms": ms, "ratio": ratio}
                rows.append({**row, "predicted_ms": 1000 * least[1], "predicted_ratio": predicted})
                show(f"{name:12} {precision:5} {mode:9}", found[1][1], ratio)
                del run
            show(f"{name:12} {precision:5} predicted", rows[-1]["predicted_ms"], rows[-1]["predicted_ratio"])
    return rows


def times(run: Pass, lengths: Iterable[int], repeats: int) -> dict[int, tuple[float, float, float]]:
    """Least, median and greatest milliseconds by length, the lengths in turns."""
    found: dict[int, list[float]] = {n: [] for n in lengths}
    for number in range(WARM_UP + repeats):
        for n, values in found.items():
            seconds = run.seconds(n)
            if number >= WARM_UP:
                values.append(1000 * seconds)
    return {n: (min(values), statistics.median(values), max(values)) for n, values in found.items()}


def show(label: str, ms: float, ratio: dict[str, float]) -> None:
    print(f"{label} {ms:8.2f} " + " ".join(f"{value:<6.2f}" for value in ratio.values()), flush=True)
