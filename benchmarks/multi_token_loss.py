"""Cost of the loss of multi-token heads: peak memory, training speed, and what dropped targets save.

* `memory`: one loss step, forward and backward, from given outputs of the trunk, with 1 and 4 extra heads of type mlp. Printed is
  the peak above the memory before the step: activations, logits and gradients. Each case runs in its own process.
* `step`: training steps with AdamW of a model with 4 extra heads and of the same model without. The last column predicts the
  ratio from the FLOPs of the matrix products.
* `kept`: the unembedding alone, where only a share of the targets has weight.

mull is compared with `F.cross_entropy` of materialised logits ("logits"), and with `--torch` also with torch's chunked
`F.linear_cross_entropy`, which takes minutes on a CPU. Times are medians over rounds in which the variants alternate, so that a
drifting machine affects all of them.

    python benchmarks/multi_token_loss.py [--device cuda] [--parts memory step kept] [--rounds 5] [--threads 2] [--torch]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.heads import HeadTask, MTPHeads, head_losses
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.targets import targets_of

WIDTH, N_TOKENS, VOCABULARY = 512, 2048, 65536
LOSSES = ("mull", "logits", "torch")
RESULTS = Path(__file__).parent / "results"


def precision(device: str, name: str) -> AbstractContextManager[None]:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=name == "bf16")


def chunked_by_torch(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    """Coefficients other than 0 must be equal, because torch's sum is faster than its single losses."""
    # It ignores autocast.
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    options = nn.LinearCrossEntropyOptions()
    targets = targets.masked_fill(coefficients == 0, -100)
    return coefficients.max() * F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def from_logits(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    return (losses * coefficients).sum()


def loss_of_heads(kind: str, heads: MTPHeads, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    coefficients = torch.full(targets.shape, 1 / targets.numel(), device=targets.device)
    if kind == "mull":
        task = HeadTask(heads, targets, coefficients, lambda block, h, _k: block(h))
        return head_losses(hidden, None, weight, task)[0]
    states = [hidden, *(heads(k, hidden, None, lambda block, h, _k: block(h)) for k in range(1, 1 + heads.n_heads))]
    if kind == "logits":
        return from_logits(torch.stack(states, 2).flatten(0, 2), weight, targets.flatten(), coefficients.flatten())
    per_head = [
        chunked_by_torch(state[0], weight, targets[0, :, k], coefficients[0, :, k]) for k, state in enumerate(states)
    ]
    return torch.stack(per_head).sum()


def current_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return _from_status("VmRSS")


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _from_status("VmHWM")


def _from_status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_of_case(device: str, kind: str, n_heads: int, dtype: str) -> float:
    """Peak memory in MiB above the memory before the step."""
    torch.manual_seed(0)
    heads = MTPHeads("mlp", n_heads, WIDTH, nn.Identity, nn.Identity)
    heads = heads.to(device)

    def step(vocabulary: int, n_tokens: int) -> float:
        hidden = torch.randn(1, n_tokens, WIDTH, device=device, requires_grad=True)
        weight = torch.randn(vocabulary, WIDTH, device=device).mul_(0.05).requires_grad_()
        targets = torch.randint(vocabulary, (1, n_tokens, 1 + n_heads), device=device)
        before = current_mib(device)
        reset_peak(device)
        with precision(device, dtype):
            loss = loss_of_heads(kind, heads, hidden, weight, targets)
        loss.backward()
        return peak_mib(device) - before

    step(512, 64)  # warm up: libraries allocate some memory once
    heads.zero_grad()
    return step(VOCABULARY, N_TOKENS)


def measure_memory(device: str, threads: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    print(f"\nmemory: {N_TOKENS} tokens, width {WIDTH}, vocabulary {VOCABULARY}; MiB above the memory before the step")
    print(f"{'precision':10} {'variant':8} {'1 head':>10} {'4 heads':>10} {'ratio':>7}")
    for dtype in ("fp32", "bf16"):
        for kind in kinds:
            peaks = []
            for n_heads in (1, 4):
                case = [device, kind, str(n_heads), dtype, str(threads)]
                out = subprocess.run(
                    [sys.executable, __file__, "--case", *case], check=True, capture_output=True, text=True
                )
                peaks.append(float(out.stdout))
            rows.append({"precision": dtype, "variant": kind, "mib_1_head": peaks[0], "mib_4_heads": peaks[1]})
            print(f"{dtype:10} {kind:8} {peaks[0]:10.0f} {peaks[1]:10.0f} {peaks[1] / peaks[0]:7.2f}", flush=True)
    return rows


def seconds(variants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median duration of each variant; the first round warms up."""
    durations: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                durations[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in durations.items()}


def make_model(vocabulary: int, n_heads: int, device: str) -> MullForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    mtp = MTPConfig(num_predict_tokens=n_heads, mtp_head_type="mlp") if n_heads else None
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), None, mtp).to(device).train()


def train_step(model: MullForCausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor, dtype: str) -> None:
    with precision(tokens.device.type, dtype):
        hidden = model.hidden_states(tokens)
        n_heads = 0 if model.mtp_config is None else model.mtp_config.num_predict_tokens
        targets = targets_of(tokens, None, 1 + n_heads)
        coefficients = (targets >= 0) / float(tokens.numel())
        loss, _ = model.head_losses(hidden, tokens, targets, coefficients)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_step(device: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    print(f"\nstep: 8 layers of width {WIDTH}, batch of 8 x 256 tokens, AdamW; tokens per second")
    print(f"{'vocabulary':>10} {'precision':>10} {'next token':>11} {'4 heads':>9} {'ratio':>7} {'by FLOPs':>9}")
    for vocabulary in (512, 32768):
        for dtype in ("fp32", "bf16"):
            tokens = torch.randint(vocabulary, (8, 256), device=device)
            variants: dict[str, Callable[[], object]] = {}
            for n_heads in (0, 4):
                model = make_model(vocabulary, n_heads, device)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
                variants[str(n_heads)] = partial(train_step, model, optimizer, tokens, dtype)
            speed = {name: tokens.numel() / value for name, value in seconds(variants, rounds, device).items()}
            matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2) + vocabulary * WIDTH
            predicted = matrices / (matrices + 4 * (WIDTH + vocabulary) * WIDTH)
            row = {"vocabulary": vocabulary, "precision": dtype, "tokens_per_s": speed["0"]}
            rows.append({**row, "tokens_per_s_4_heads": speed["4"], "ratio_by_flops": predicted})
            print(
                f"{vocabulary:10} {dtype:>10} {speed['0']:11.0f} {speed['4']:9.0f} {speed['4'] / speed['0']:7.3f} "
                f"{predicted:9.3f}",
                flush=True,
            )
    return rows


def measure_kept(device: str, rounds: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    vocabulary = 32768
    print(f"\nkept: unembedding of {N_TOKENS} tokens, width {WIDTH}, vocabulary {vocabulary}; milliseconds")
    print(f"{'precision':10} {'kept':>6} " + " ".join(f"{kind:>9}" for kind in kinds) + f" {'logits/mull':>12}")
    weight = torch.randn(vocabulary, WIDTH, device=device).mul_(0.05).requires_grad_()
    hidden = torch.randn(N_TOKENS, WIDTH, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (N_TOKENS,), device=device)

    def run(loss_of: Callable[..., Any], select: bool, coefficients: Tensor, dtype: str) -> None:
        with precision(device, dtype):
            rows = coefficients != 0
            given = (hidden[rows], targets[rows], coefficients[rows]) if select else (hidden, targets, coefficients)
            loss = loss_of(given[0], weight, given[1], given[2])
            (loss if isinstance(loss, Tensor) else loss[0]).backward()
        hidden.grad = weight.grad = None

    for dtype in ("fp32", "bf16"):
        for kept in (1.0, 0.6, 0.4, 0.2):
            coefficients = (torch.rand(N_TOKENS, device=device).argsort() < kept * N_TOKENS).float()
            loss_of = {"mull": weighted_cross_entropy, "logits": from_logits, "torch": chunked_by_torch}
            variants = {kind: partial(run, loss_of[kind], kind == "mull", coefficients, dtype) for kind in kinds}
            durations = seconds(variants, rounds, device)
            rows.append({"precision": dtype, "kept": kept, **{f"ms_{k}": 1000 * v for k, v in durations.items()}})
            print(
                f"{dtype:10} {kept:6.0%} "
                + " ".join(f"{1000 * durations[kind]:9.1f}" for kind in kinds)
                + f" {durations['logits'] / durations['mull']:12.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=["memory", "step", "kept"], choices=["memory", "step", "kept"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        device, kind, n_heads, dtype, threads = arguments.case
        torch.set_num_threads(int(threads))
        print(memory_of_case(device, kind, int(n_heads), dtype))
        return
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {arguments.threads} threads"
    print(f"{name}, torch {torch.__version__}, {arguments.rounds} rounds")
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "rounds": arguments.rounds}
    kinds = LOSSES if arguments.torch else LOSSES[:2]
    if "memory" in arguments.parts:
        results["memory"] = measure_memory(device, arguments.threads, kinds)
    if "step" in arguments.parts:
        results["step"] = measure_step(device, arguments.rounds)
    if "kept" in arguments.parts:
        results["kept"] = measure_kept(device, arguments.rounds, kinds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"multi_token_loss-{device}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
