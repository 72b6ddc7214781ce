"""LoRA experts on two planted domains: do they specialise, and does that beat one LoRA of equal size and random assignment?

A small model is trained on texts that step through a permutation of the symbols; the first token says which of several it is. Then it
is frozen, and its think block gets LoRA for two new permutations of the same symbols: as two experts of rank r with a gate, as two
experts that tokens draw at random, and as one LoRA of rank 2 r.

    python benchmarks/experts.py [--seeds 3] [--steps 600] [--rank 2] [--out FILE]
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import ETDConfig, LoRAExpertConfig, MullForCausalLM, wrap_transformer_with_etd

N_SYMBOLS, N_BASE, LENGTH, ROWS = 48, 4, 12, 32
DOMAINS = (N_BASE, N_BASE + 1)
"""Numbers of the two new permutations."""

ARMS = {
    "gated": (2, 1, "gate"),
    "random": (2, 1, "random"),
    "one LoRA": (1, 2, "gate"),
}
"""Number of experts, rank in units of r, and who assigns."""


class Permutations:
    """Texts ``[d, x, p_d(x), x', p_d(x'), ...]``; symbols come after the tokens that name permutations."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.maps = torch.stack(
            [torch.randperm(N_SYMBOLS, generator=self.generator) for _ in range(N_BASE + len(DOMAINS))]
        )

    def batch(self, domains: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Texts ``[B, T]``, and the domain of each row."""
        chosen = torch.tensor(domains)[torch.randint(len(domains), (ROWS,), generator=self.generator)]
        x = torch.randint(N_SYMBOLS, (ROWS, LENGTH), generator=self.generator)
        pairs = torch.stack([x, self.maps[chosen[:, None], x]], -1).flatten(1)
        return torch.cat([chosen[:, None], pairs + len(self.maps)], 1), chosen


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits[:, 1:-1:2]  # the second symbol of each pair
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2::2].flatten())


def train(model: Any, batches: Iterator[Tensor], steps: int, lr: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, next(batches)).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def pretrained(texts: Permutations, steps: int) -> Any:
    config = Qwen3Config(
        vocab_size=len(texts.maps) + N_SYMBOLS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config)
    train(base, iter(lambda: texts.batch(range(N_BASE))[0], None), steps, 3e-3)
    return base


def with_lora(base: Any, n_experts: int, rank: int, assign: str, given: argparse.Namespace) -> MullForCausalLM:
    lora = LoRAExpertConfig(
        rank=rank,
        alpha=2.0 * rank,
        target_modules=tuple(given.maps.split(",")),
        balance_rate=given.balance_rate,
        granularity=given.granularity,
    )
    config = ETDConfig(
        n_encoder_layers=1,
        n_think_layers=2,
        n_decoder_layers=1,
        max_think_iterations=1,
        num_lora_experts=n_experts,
        lora_expert=lora,
        expert_warmup_steps=10**9 if assign == "random" else given.warmup,
    )
    model = wrap_transformer_with_etd(base, config)
    model.requires_grad_(False)
    assert model.etd is not None
    model.etd.requires_grad_(True)
    return model


@torch.no_grad()
def measure(model: MullForCausalLM, texts: Permutations, assign: str) -> dict[str, Any]:
    """Held-out loss and accuracy, load, and mutual information of domain and expert in bits."""
    losses, right, joint = [], [], torch.zeros(len(DOMAINS), 2)
    model.train(assign == "random")  # in use, a gate always chooses; here tokens are to draw
    for _ in range(16):
        tokens, domains = texts.batch(DOMAINS)
        with torch.set_grad_enabled(assign == "random"):
            out = model(tokens, use_cache=False)
        losses.append(float(F.cross_entropy(out.logits[:, 1:-1:2].flatten(0, 1), tokens[:, 2::2].flatten())))
        right.append(float((out.logits[:, 1:-1:2].argmax(-1) == tokens[:, 2::2]).double().mean()))
        assert out.metrics is not None
        chosen = out.metrics["expert_selections"][-1][:, 1::2]
        for domain in range(len(DOMAINS)):
            joint[domain] += chosen[domains == DOMAINS[domain]].flatten().bincount(minlength=2)
    model.eval()
    share = joint / joint.sum()
    independent = share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    bits = float(torch.where(share > 0, share * (share / independent).log2(), 0.0).sum())
    return {
        "loss": sum(losses) / len(losses),
        "accuracy": sum(right) / len(right),
        "load": share.sum(0).tolist(),
        "bits": bits,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--balance-rate", type=float, default=0.001)
    parser.add_argument("--granularity", choices=["token", "sequence"], default="token")
    parser.add_argument("--maps", default="down_proj")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, started = [], time.perf_counter()
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        texts = Permutations(seed)
        base = pretrained(texts, given.base_steps)
        with torch.no_grad():
            print(f"seed {seed}: base model {float(loss_of(base, texts.batch(range(N_BASE))[0])):.3f} nats", flush=True)
        for name, (n_experts, factor, assign) in ARMS.items():
            torch.manual_seed(seed)
            texts.generator.manual_seed(1000 + seed)
            model = with_lora(base, n_experts, factor * given.rank, assign, given)
            train(model, iter(lambda: texts.batch(DOMAINS)[0], None), given.steps, given.lr)
            row = {"seed": seed, "arm": name, **measure(model, texts, assign)}
            row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append(row)
            load = " ".join(f"{share:.2f}" for share in row["load"])
            print(
                f"  {name:<10} {row['parameters']:>7,} parameters  loss {row['loss']:.3f}  accuracy {row['accuracy']:.3f}  "
                f"load {load}  {row['bits']:.2f} bits",
                flush=True,
            )
    if given.out is not None:
        facts = header("cpu", seconds=time.perf_counter() - started, **{k: v for k, v in vars(given).items() if k != "out"})
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
