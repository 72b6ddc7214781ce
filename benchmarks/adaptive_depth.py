"""What a stopped token saves: time of the think block at half the mean depth, relative to full depth.

Tokens stop at random, each on its own, so that the mean depth is known: after 1, 2 or 3 of 4 iterations with equal probability,
which is 2 on average. Four ways of running are measured, each in turns with the fixed path and with a rule that never stops:
training (forward and backward), prefill of 1,024 tokens, decoding of one row and of eight. The time of the other layers and of
the unembedding, measured by a path without the think block, is taken off. Half the depth is measured once more with keys that
all iterations share (``share_first``), and the bytes of both caches are counted. Then decoding of one row, compiled and not: what
compiling gains with adaptive depth, relative to what it gains with a fixed one.

`--real DIRECTORY` measures decoding with a pretrained model instead: three iterations of six of its layers at a mean of 1.5, and
with the rule that reads the unembedding, whose cost is included.

    python benchmarks/adaptive_depth.py [--real DIRECTORY]
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from race import header, machine
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

import mull
from mull import ETDConfig, HaltingConfig, wrap_transformer_with_etd
from mull.decoding import decoder_cache
from mull.model.halting import RULES, Evidence
from mull.model.path import from_layers

RESULTS = Path(__file__).parent / "results"
ITERATIONS = 4
STOP = {1: 1 / 3, 2: 1 / 2, 3: 1.0}
"""Probability that a token that still thinks stops after an iteration: depths 1, 2 and 3 are equally likely."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STOP_REAL = {1: 0.6, 2: 0.75}
"""Of three iterations: a mean of 1.5."""


def drawn(chances: dict[int, float]) -> Callable[[Any], Callable[[Evidence], Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def rule(evidence: Evidence) -> Tensor:
        return torch.rand(len(evidence.state), generator=generator) < chances[evidence.iteration]

    return lambda _config: rule


def model_of(dtype: torch.dtype) -> mull.MullForCausalLM:
    """One layer, eight that think, one layer; about 40 million parameters."""
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    return wrap_transformer_with_etd(base, ETDConfig(n_encoder_layers=1, n_think_layers=8, n_decoder_layers=1)).eval()


Way = Callable[[dict[str, Any]], float]
"""Runs once with these arguments of a call; returns the seconds."""


def forward(model: Any, ids: Tensor, train: bool) -> Way:
    def run(options: dict[str, Any]) -> float:
        model.train(train)
        started = time.perf_counter()
        with torch.set_grad_enabled(train):
            out = model(ids, labels=ids if train else None, logits_to_keep=0 if train else 1, **options)
        if train:
            out.loss.backward()
            model.zero_grad()
        return time.perf_counter() - started

    return run


def decoding(model: Any, ids: Tensor, tokens: int) -> Way:
    def run(options: dict[str, Any]) -> float:
        model.eval()
        stats = mull.generate(model, ids, max_new_tokens=tokens, pad_token_id=0, eos_token_id=(), **options).stats
        return stats.decode_seconds / stats.rounds

    return run


def measure(way: Way, calls: dict[Any, dict[str, Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each call, in turns, without the first round."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            spent = way(calls[name])
            if number:
                seconds[name].append(spent)
    return seconds


def shares(seconds: dict[str, list[float]], without: str) -> dict[str, dict[str, float]]:
    """Time of the think block relative to the fixed path, round by round: median and range."""
    found = {}
    for name, of_call in seconds.items():
        if name in ("fixed", without):
            continue
        values = [(a - c) / (b - c) for a, b, c in zip(of_call, seconds["fixed"], seconds[without], strict=True)]
        found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found


def synthetic(arguments: argparse.Namespace) -> dict[str, Any]:
    RULES["drawn"] = drawn(STOP)
    fixed = {"think_iterations": ITERATIONS}
    calls = {
        "fixed": {**fixed, "adaptive": False},
        "never": {**fixed, "adaptive": HaltingConfig(rule="state", threshold=2.0)},
        "half": {**fixed, "adaptive": HaltingConfig(rule="drawn")},
        "half, shared keys": {**fixed, "adaptive": HaltingConfig(rule="drawn", stop="share_first")},
        "rest": {"path": from_layers([0, 9])},
    }
    ids = torch.randint(1, 4096, (8, 1024), generator=torch.Generator().manual_seed(0))
    results = {}
    for precision in arguments.precision:
        model = model_of(DTYPES[precision])
        results[f"{precision}, cache"] = cache_bytes(model, ids[:1], calls)
        ways = {
            "training, 4 x 256": forward(model, ids[:4, :256], train=True),
            "prefill, 1 x 1024": forward(model, ids[:1], train=False),
            "decoding, 1 row": decoding(model, ids[:1, :128], arguments.tokens),
            "decoding, 8 rows": decoding(model, ids[:, :128], arguments.tokens),
        }
        for name, way in ways.items():
            seconds = measure(way, calls, arguments.rounds)
            results[f"{precision}, {name}"] = {**shares(seconds, "rest"), "seconds": seconds}
            show(f"{precision}, {name}", results[f"{precision}, {name}"])
        results[f"{precision}, compiled"] = compiled(ways["decoding, 1 row"], calls, arguments.rounds)
    return results


@torch.no_grad()
def cache_bytes(model: Any, ids: Tensor, calls: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Bytes of the keys and values of a row of 1,024 tokens."""
    found = {}
    for name in ("half", "half, shared keys", "rest"):
        layers = model(ids, use_cache=True, logits_to_keep=1, **calls[name]).past_key_values.layers
        found[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    print(", ".join(f"{name}: {n_bytes:,} bytes of keys and values" for name, n_bytes in found.items()), flush=True)
    return found


def compiled(way: Way, calls: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """What compiling gains, by call: the time of a token before, divided by that after."""
    decoder_cache.KEPT_DECODERS = 2 * len(calls)
    turns = {
        (name, mode): {**calls[name], "compile": mode} for name in ("fixed", "never", "half") for mode in (False, True)
    }
    seconds = measure(way, turns, rounds)
    gains = {
        name: [eager / fast for eager, fast in zip(seconds[name, False], seconds[name, True], strict=True)]
        for name, _ in list(turns)[::2]
    }
    kept = {
        name: [a / b for a, b in zip(values, gains["fixed"], strict=True)]
        for name, values in gains.items()
        if name != "fixed"
    }
    for name, values in kept.items():
        gain, fixed = statistics.median(gains[name]), statistics.median(gains["fixed"])
        print(f"compiled: {name} gains {gain:.2f}, fixed {fixed:.2f}; kept {statistics.median(values):.2f}", flush=True)
    return {"gains": gains, "kept": kept}


def real(arguments: argparse.Namespace) -> dict[str, Any]:
    RULES["drawn"] = drawn(STOP_REAL)
    split = ETDConfig(n_encoder_layers=6, n_think_layers=6, n_decoder_layers=18)
    precision = arguments.precision[0]
    model = mull.from_pretrained(arguments.real, etd=split, dtype=DTYPES[precision])
    ids = torch.randint(1, 40_000, (1, 128), generator=torch.Generator().manual_seed(0))
    fixed = {"think_iterations": 3}
    calls = {
        "fixed": {**fixed, "adaptive": False},
        "never": {**fixed, "adaptive": HaltingConfig(rule="state", threshold=2.0)},
        "never, reading out": {**fixed, "adaptive": HaltingConfig(rule="confidence", threshold=2.0)},
        "half": {**fixed, "adaptive": HaltingConfig(rule="drawn")},
        "rest": {"path": from_layers([*range(6), *range(12, 30)])},
    }
    seconds = measure(decoding(model, ids, arguments.tokens), calls, arguments.rounds)
    results = {**shares(seconds, "rest"), "seconds": seconds}
    show(f"decoding, 1 row, {precision}, real model", results)
    whole = statistics.median(a / b for a, b in zip(seconds["half"], seconds["fixed"], strict=True))
    print(f"whole pass at a mean of 1.5 iterations: {whole:.2f} of that at 3")
    return {"decoding": results, "whole_pass": whole}


def show(name: str, result: dict[str, Any]) -> None:
    parts = [
        f"{call} {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})"
        for call, value in result.items()
        if call != "seconds"
    ]
    print(f"{name:30} think block relative to fixed: {', '.join(parts)}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of a pretrained model of 30 layers")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    results = real(arguments) if arguments.real else synthetic(arguments)
    name = "adaptive_depth-real-cpu.json" if arguments.real else "adaptive_depth-cpu.json"
    file = arguments.result or RESULTS / name
    file.write_text(json.dumps({**header("cpu", rounds=arguments.rounds), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
