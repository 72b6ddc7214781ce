"""LoRA experts on two planted domains: do they specialise, and does that beat one LoRA of equal size and random assignment?

Texts of both domains are made of the same random symbols; every other token names the domain. The teacher is a small random
model whose think block has a hidden LoRA for each domain, that of the second the negative of the first. So within a domain a
low-rank update is exactly right, and the domains contradict each other. Students start from the model without the update, and
learn the teacher's distribution: with two experts of the hidden rank and a gate, with two experts that tokens draw at random,
and with one LoRA of twice the rank.

    python benchmarks/experts.py [--seeds 3] [--steps 800] [--rank 4] [--granularity token] [--out FILE]
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import ETDConfig, LoRAExpertConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.experts import LoRABranches

N_DOMAINS, N_SYMBOLS, PAIRS, ROWS, WIDTH = 2, 62, 12, 16, 64
HIDDEN_STD = 1.0
"""Of the teacher's B: its update changes about as much as the layer itself does."""

ARMS = {"gated": (2, 1, "gate"), "random": (2, 1, "random"), "one LoRA": (1, 2, "gate")}
"""Number of experts, rank in units of the hidden rank, and who assigns."""


def base_model() -> Any:
    config = Qwen3Config(
        vocab_size=N_DOMAINS + N_SYMBOLS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=WIDTH**-0.5,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


def with_lora(base: Any, n_experts: int, rank: int, warmup: int, given: argparse.Namespace) -> MullForCausalLM:
    lora = LoRAExpertConfig(
        rank=rank,
        alpha=2.0 * rank,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
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
        expert_warmup_steps=warmup,
    )
    model = wrap_transformer_with_etd(base, config)
    model.requires_grad_(False)
    assert model.etd is not None
    model.etd.requires_grad_(True)
    return model


class Domains:
    """Texts, and what the teacher says of them."""

    def __init__(self, base: Any, given: argparse.Namespace) -> None:
        self._teacher = with_lora(copy.deepcopy(base), N_DOMAINS, given.rank, 0, given).eval()
        for branches in self._teacher.modules():
            if isinstance(branches, LoRABranches):
                nn.init.normal_(branches.lora_B, std=HIDDEN_STD / given.rank**0.5)
                with torch.no_grad():
                    branches.lora_A[1], branches.lora_B[1] = branches.lora_A[0], -branches.lora_B[0]

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Texts ``[B, T]``, the teacher's log-probabilities ``[B, T / 2, V]`` at symbols, and the domain of each row."""
        domains = torch.arange(ROWS) % N_DOMAINS
        symbols = N_DOMAINS + torch.randint(N_SYMBOLS, (ROWS, PAIRS))
        tokens = torch.stack([domains[:, None].expand_as(symbols), symbols], -1).flatten(1)
        logits = torch.empty(*symbols.shape, N_DOMAINS + N_SYMBOLS)
        assert self._teacher.etd is not None
        assert self._teacher.etd.experts is not None
        for domain in range(N_DOMAINS):
            self._teacher.etd.experts.bias.copy_(
                10.0 * F.one_hot(torch.tensor(domain), N_DOMAINS)
            )  # everybody's choice
            rows = domains == domain
            logits[rows] = self._teacher(tokens[rows], use_cache=False).logits[:, 1::2]
        return tokens, logits.log_softmax(-1), domains


def divergence(model: Any, tokens: Tensor, expected: Tensor) -> tuple[Tensor, Any]:
    """Nats per symbol, and the call's output. The prompt of a row is its first token, which names the domain."""
    out = model(tokens, use_cache=False)
    found = out.logits[:, 1::2].log_softmax(-1)
    return F.kl_div(found.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True), out


def train(model: MullForCausalLM, texts: Domains, given: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.steps)
    model.train()
    for _ in range(given.steps):
        optimizer.zero_grad()
        tokens, expected, _ = texts.batch()
        divergence(model, tokens, expected)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def measure(model: MullForCausalLM, texts: Domains, assign: str) -> dict[str, Any]:
    """Held-out divergence, load, and mutual information of domain and expert in bits, over tokens."""
    losses, joint = [], torch.zeros(N_DOMAINS, 2)
    model.train(assign == "random")  # in use a gate always chooses, and here tokens are to draw
    for _ in range(32):
        tokens, expected, domains = texts.batch()
        loss, out = divergence(model, tokens, expected)
        losses.append(float(loss.detach()))
        for domain, chosen in zip(domains.tolist(), out.metrics["expert_selections"][-1], strict=True):
            joint[domain] += chosen.bincount(minlength=2)
    share = joint / joint.sum()
    independent = share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    bits = float(torch.where(share > 0, share * (share / independent).log2(), 0.0).sum())
    return {"divergence": sum(losses) / len(losses), "load": share.sum(0).tolist(), "bits": bits}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--warmup", type=int, default=0, help="steps in which experts are drawn")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--balance-rate", type=float, default=0.02)
    parser.add_argument("--granularity", choices=["token", "sequence"], default="token")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, started = [], time.perf_counter()
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        base = base_model()
        texts = Domains(base, given)
        untrained = float(divergence(wrap_transformer_with_etd(base, None).eval(), *texts.batch()[:2])[0].detach())
        print(f"seed {seed}: {untrained:.3f} nats per symbol without LoRA", flush=True)
        for name, (n_experts, factor, assign) in ARMS.items():
            torch.manual_seed(seed)
            warmup = 10**9 if assign == "random" else given.warmup
            model = with_lora(copy.deepcopy(base), n_experts, factor * given.rank, warmup, given)
            train(model, texts, given)
            row = {"seed": seed, "arm": name, "untrained": untrained, **measure(model, texts, assign)}
            row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append(row)
            load = " ".join(f"{share:.2f}" for share in row["load"])
            print(
                f"  {name:<10} {row['parameters']:>7,} parameters  {row['divergence']:.4f} nats  load {load}  "
                f"{row['bits']:.2f} bits",
                flush=True,
            )
    if given.out is not None:
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        facts = header("cpu", seconds=time.perf_counter() - started, **settings)
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
