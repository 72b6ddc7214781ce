"""Cost of decoding through mull's path loop, compared with transformers' own `generate` on the same weights.

Greedy decoding, batch 1, with the cache. The variants alternate in one process, so that a drifting machine affects all equally;
the median over the rounds is printed with its spread. The last column is the time to read the weights once per visit at the
measured bandwidth, which is what a decoder that only moved weights would need.

    python benchmarks/decode_overhead.py [--tokens 128] [--rounds 7] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import ETDConfig, wrap_transformer_with_etd
from mull.evaluation.cost.count import measure_machine

SIZES = {
    "tiny (overhead only)": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8},
    "20M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
}


def make(size: dict[str, int]) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=4096,
        num_attention_heads=size["hidden_size"] // 32,
        num_key_value_heads=max(size["hidden_size"] // 128, 1),
        head_dim=32,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        **size,
    )


def median_ms(
    variants: dict[str, Callable[[], object]], rounds: int, tokens: int
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds per token of each variant: median, smallest and largest over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up.
    kept = {name: [1000 * value / tokens for value in values[1:]] for name, values in seconds.items()}
    return {name: (statistics.median(values), min(values), max(values)) for name, values in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speed = measure_machine("cpu", torch.float32).bandwidth
    print(f"{arguments.threads} thread(s), fp32, read bandwidth {speed / 1e9:.1f} GB/s, {arguments.tokens} tokens, "
          f"{arguments.rounds} rounds")  # fmt: skip
    print(f"{'model':22} {'variant':26} {'ms/token':>9} {'min':>8} {'max':>8} {'weights only':>13}")
    for label, size in SIZES.items():
        measure(label, size, arguments.tokens, arguments.rounds, speed)


def measure(label: str, size: dict[str, int], tokens: int, rounds: int, speed: float) -> None:
    """Print one model's rows."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(make(size)).eval()
    model = wrap_transformer_with_etd(base, ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2))
    prompt = torch.randint(1, 4096, (1, 32))
    options = {"max_new_tokens": tokens, "do_sample": False}
    variants: dict[str, Callable[[], object]] = {"transformers generate": partial(base.generate, prompt, **options)}
    visits = {"transformers generate": 8}
    for k in (1, 2, 4):
        variants[f"mull, {k} iteration(s)"] = partial(model.generate, prompt, think_iterations=k, **options)
        visits[f"mull, {k} iteration(s)"] = 4 + 4 * k
    layer_bytes = sum(p.numel() for p in base.model.layers[0].parameters()) * 4
    head_bytes = base.lm_head.weight.numel() * 4
    for name, (middle, low, high) in median_ms(variants, rounds, tokens).items():
        floor = 1000 * (layer_bytes * visits[name] + head_bytes) / speed
        print(f"{label:22} {name:26} {middle:9.3f} {low:8.3f} {high:8.3f} {floor:13.3f}")


if __name__ == "__main__":
    main()
