"""What layer routers and LoRA experts cost, and what a skipped layer saves: prefill and decoding of a pretrained model, in turns.

Routers stand in front of all layers. Their last bias is set so that they execute every layer, or skip every third. Experts are
new, so they add zero.

    python benchmarks/route_cost.py MODEL [--rounds 7] [--prompt 512] [--tokens 16] [--out FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor

import mull
from mull import ETDConfig, LayerRouterConfig, LoRAExpertConfig
from mull.layers.routers import EXECUTE, SKIP

PLAIN = "plain"


def variants(name: str) -> dict[str, Any]:
    """Models by name; all have the weights of the first."""
    plain: Any = mull.from_pretrained(name, dtype=torch.float32)
    n_layers = len(plain.model.layers)
    third = n_layers // 3
    split = {"n_encoder_layers": third, "n_think_layers": third, "n_decoder_layers": n_layers - 2 * third}
    found = {PLAIN: plain}
    for granularity in ("sequence", "token"):
        router = LayerRouterConfig(granularity=granularity, scope="all", num_actions=2)
        for actions in ("execute", "skip a third"):
            etd = ETDConfig(**split, max_think_iterations=1, layer_router=router, router_warmup_steps=0)
            model: Any = mull.from_pretrained(name, etd, dtype=torch.float32)
            for layer, module in model.etd.layer_routers.by_layer.items():
                skips = actions != "execute" and int(layer) % 3 == 1
                module.out.bias.data[SKIP if skips else EXECUTE] = 9.0
            found[f"routers of {granularity}s, {actions}"] = model
    for n_experts in (1, 8):
        lora = LoRAExpertConfig(rank=16)
        etd = ETDConfig(
            **split, max_think_iterations=1, lora_expert=lora, num_lora_experts=n_experts, expert_warmup_steps=0
        )
        found[f"{n_experts} LoRA experts"] = mull.from_pretrained(name, etd, dtype=torch.float32)
    return {name: model.eval() for name, model in found.items()}


@torch.no_grad()
def prefill(model: Any, prompt: Tensor) -> None:
    model.model(prompt, use_cache=True)


@torch.no_grad()
def decode(model: Any, cache: Any, token: Tensor, n_tokens: int) -> None:
    for _ in range(n_tokens):
        model.model(token, past_key_values=cache, use_cache=True)


def seconds(call: Callable[..., None], *arguments: Any) -> float:
    """Processor time of the one thread, which other programs hardly change."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models = variants(given.model)
    prompt = torch.randint(100, 1000, (1, given.prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    names = list(models)
    for round_number in range(1 + given.rounds):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            model = models[name]
            taken = {"prefill": seconds(prefill, model, prompt)}
            with torch.no_grad():
                cache = model.model(prompt[:, :64], use_cache=True).past_key_values
            taken["decode"] = seconds(decode, model, cache, prompt[:, :1], given.tokens)
            if round_number:  # the first one warms up
                for what, value in taken.items():
                    times[name][what].append(value)
    results = {}
    for name, of_model in times.items():
        results[name] = {}
        for what, values in of_model.items():
            shares = [value / plain for value, plain in zip(values, times[PLAIN][what], strict=True)]
            results[name][what] = {"median": statistics.median(shares), "range": [min(shares), max(shares)]}
        row = "  ".join(
            f"{what} {found['median']:.2f} ({found['range'][0]:.2f} to {found['range'][1]:.2f})"
            for what, found in results[name].items()
        )
        print(f"{name:<36} {row}", flush=True)
    if given.out is not None:
        settings = {name: value for name, value in vars(given).items() if name not in ("out", "model")}
        given.out.write_text(json.dumps(header("cpu", **settings) | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
