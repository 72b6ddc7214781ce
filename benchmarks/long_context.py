"""Decoding after long prompts: time per token and bytes of the cache, of a Qwen3 source and of its hybrid, in turns.

Both have random weights, heads of Qwen3-0.6B's shape, few layers and a small vocabulary. The hybrid is the source's conversion,
three layers of four Gated DeltaNet. Everything goes through `mull.generate`; the time of a token is that of the
rounds after the prompt.

    python benchmarks/long_context.py [--layers 4] [--heads 8] [--width 512] [--lengths 512 2048 8192 32768] [--out FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from race import header
from transformers import Qwen3Config, Qwen3ForCausalLM

import mull
from mull import create_hybrid_from_qwen3
from mull.model.fixed_cache import StaticSlotCache

NAMES = ("source", "hybrid")


def models(layers: int, heads: int, width: int) -> dict[str, Any]:
    """The source and its hybrid, in fp32."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    source = Qwen3ForCausalLM(config).eval()
    hybrid = create_hybrid_from_qwen3(source)
    wrapped = mull.wrap_transformer_with_etd(source, None).eval()
    return dict(zip(NAMES, (wrapped, hybrid.eval()), strict=True))


def cache_bytes(model: Any, n_tokens: int) -> int:
    """Bytes that a row of so many tokens takes, as `mull.generate` allocates them."""
    cache = StaticSlotCache(
        model.config.get_text_config(), model.path(None), 1, n_tokens, dtype=torch.float32, device=torch.device("meta")
    )
    return cache.n_bytes


def crossover(rows: Sequence[dict[str, Any]]) -> float | None:
    """Prompt length from which the hybrid is faster, on the line between the nearest measured lengths; None if nowhere."""
    for low, high in pairwise(rows):
        first, last = (row["source"]["seconds"] - row["hybrid"]["seconds"] for row in (low, high))
        if first <= 0 < last:
            return float(low["length"] + (high["length"] - low["length"]) * first / (first - last))
    return float(rows[0]["length"]) if rows[0]["source"]["seconds"] > rows[0]["hybrid"]["seconds"] else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8, help="of queries, and 8 of keys and values")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started, both, rows = time.perf_counter(), models(given.layers, given.heads, given.width), []
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in both.items()}
    print(f"parameters {weights}: the hybrid has {weights['hybrid'] / weights['source'] - 1:+.0%}", flush=True)
    for length in given.lengths:
        prompt = torch.randint(1024, (1, length), generator=torch.Generator().manual_seed(length))
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        prefill: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(given.rounds if length < max(given.lengths) else 1):
            for name, model in both.items():
                stats = mull.generate(model, prompt, max_new_tokens=given.tokens, eos_token_id=()).stats
                seconds[name].append(stats.decode_seconds / stats.rounds)
                prefill[name].append(stats.prefill_seconds)
        row: dict[str, Any] = {"length": length}
        for name, model in both.items():
            row[name] = {
                "seconds": statistics.median(seconds[name]),
                "range": [min(seconds[name]), max(seconds[name])],
                "prefill": statistics.median(prefill[name]),
                "bytes": cache_bytes(model, length + given.tokens),
            }
        rows.append(row)
        source, hybrid = row["source"], row["hybrid"]
        print(
            f"{length:>6} tokens: {1e3 * source['seconds']:8.2f} and {1e3 * hybrid['seconds']:8.2f} ms per token, "
            f"{source['seconds'] / hybrid['seconds']:5.2f} times as fast; cache {source['bytes'] / 2**20:7.1f} and "
            f"{hybrid['bytes'] / 2**20:7.1f} MiB, {hybrid['bytes'] / source['bytes']:.2f}; prompt {source['prefill']:.1f} and "
            f"{hybrid['prefill']:.1f} s",
            flush=True,
        )
    print(f"crossover at {crossover(rows)} tokens")
    if given.out is not None:
        facts = header(
            "cpu", seconds=time.perf_counter() - started, layers=given.layers, heads=given.heads, width=given.width
        )
        result = {"parameters": weights, "rows": rows, "crossover": crossover(rows)}
        given.out.write_text(json.dumps(facts | result, indent=1))


if __name__ == "__main__":
    main()
