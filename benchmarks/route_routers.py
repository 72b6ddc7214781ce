"""Layer routers that learn the routes of a label file, and what their decisions are worth on questions they have not seen.

Beside the routers stand the labels themselves (a search that knows the answers), random routes with as many skips and repeats of
each layer, and the fixed route that the routers take most often. Routers of sequences, 128 wide, in front of every layer; the
published optimizer (AdamW 1e-3, cosine, weight decay 0.01, 25 epochs, batches of 16), with 8 % of warm-up.

    mull routes MODEL --task train.jsonl --scope all --labeller loss --out train-labels.jsonl
    mull routes MODEL --task test.jsonl --scope all --labeller loss --out test-labels.jsonl
    python benchmarks/route_routers.py MODEL train-labels.jsonl test-labels.jsonl [--seeds 3] [--out FILE]

The states along a labelled route never change while the model is frozen, so they are computed once, and only the routers run in
every epoch. The first loss is checked against the objective's own.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor

import mull
from mull.data.route_labels import RouteRows, load_route_rows
from mull.evaluation.search.route_report import macro_f1, report_routers, route_agreement
from mull.retrofit.source import load_tokenizer
from mull.training.objectives.resources import Resources
from mull.training.objectives.routing import RoutingConfig, class_weights, focal_loss, router_logits
from mull.training.objectives.table import make_objective
from mull.training.optimization import OptimizationConfig, build_optimizers, learning_rate_factor, update

BATCH = 16
WARM_UP = 0.08
"""Share of the steps: 500 of the paper's 6250."""


@torch.no_grad()
def pooled_states(model: Any, rows: RouteRows) -> Tensor:
    """What each router looks at along the labelled routes, ``[N, L, W, D]``."""
    found: dict[str, list[Tensor]] = {name: [] for name in model.etd.layer_routers.by_layer}
    hooks = [
        router.register_forward_pre_hook(lambda _, given, name=name: found[name].append(given[0]))
        for name, router in model.etd.layer_routers.by_layer.items()
    ]
    for numbers in torch.arange(len(rows)).split(8):
        router_logits(model, rows.rows(numbers))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(of_layer) for of_layer in found.values()], 1)


def decided(model: Any, states: Tensor) -> Tensor:
    """Logits ``[B, L, A]`` from pooled states ``[B, L, W, D]``; prompts have at least W tokens."""
    routers = model.etd.layer_routers.by_layer.values()
    return torch.stack([router(states[:, layer]).mean(1) for layer, router in enumerate(routers)], 1)


@torch.no_grad()
def fit(model: Any, states: Tensor, labels: Tensor) -> dict[str, Any]:
    """How the routers decide about what they learned, on the states of the labelled routes."""
    decisions = decided(model, states).argmax(-1)
    confusion = torch.zeros(3, 3, dtype=torch.float64)
    confusion.index_put_((labels, decisions), torch.ones((), dtype=torch.float64), accumulate=True)
    accuracy = float((decisions == labels).double().mean())
    return {"confusion": confusion.tolist(), "macro_f1": macro_f1(confusion), "accuracy": accuracy}


def train(model: Any, states: Tensor, rows: RouteRows, config: RoutingConfig, seed: int, epochs: int) -> float:
    """Train new routers, and return the last loss."""
    torch.manual_seed(seed)
    for router in model.etd.layer_routers.by_layer.values():
        router.start_at_execute()
    model.requires_grad_(False)
    model.etd.requires_grad_(True)
    counts = rows.route_labels.flatten().bincount(minlength=3).tolist()
    weights = class_weights(counts, config.balance)
    steps = epochs * len(rows) // BATCH
    settings = OptimizationConfig(
        peak_lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), warmup_steps=round(WARM_UP * steps)
    )
    optimizers = build_optimizers(model, settings)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])
    for step, numbers in enumerate(order.split(BATCH)[:steps]):
        logits = decided(model, states[numbers])
        loss = focal_loss(logits, rows.route_labels[numbers], weights, config.focal_gamma).mean()
        if step == 0:
            objective = make_objective("routing", Resources(model=model, route_labels=rows.route_labels), config)
            direct = objective(model, rows.rows(numbers))
            torch.testing.assert_close(loss, direct.sum / direct.weight, atol=1e-5, rtol=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.etd.parameters(), 1.0)
        update(optimizers, learning_rate_factor(settings, step, step / steps))
    return float(loss.detach())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path, help="labels to learn")
    parser.add_argument("test", type=Path, help="labels of other questions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--balance", type=float, nargs="+", default=[0.9999, 0.999, 0.0], help="the first is measured")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    config = mull.from_pretrained(given.model).config.get_text_config()
    routers = mull.LayerRouterConfig(hidden_size=128, scope="all")
    etd = mull.ETDConfig.for_model(config, layer_router=routers, router_warmup_steps=0, max_think_iterations=1)
    model: Any = mull.from_pretrained(given.model, etd=etd, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(given.model)
    rows, test = (load_route_rows([path], tokenizer, length=given.length) for path in (given.train, given.test))
    counts = [part.route_labels.flatten().bincount(minlength=3).tolist() for part in (rows, test)]
    print(f"{len(rows)} questions, labels {counts[0]}; test {len(test)}, {counts[1]}", flush=True)
    always = route_agreement(model, test)
    print(f"always execute: macro-F1 {always.macro_f1:.3f}, accuracy {always.accuracy:.4f}", flush=True)
    states = pooled_states(model, rows)
    results: list[dict[str, Any]] = []
    for balance in given.balance:
        for seed in range(given.seeds):
            loss = train(model, states, rows, RoutingConfig(balance=balance), seed, given.epochs)
            facts: dict[str, Any] = {"balance": balance, "seed": seed, "train_loss": loss}
            facts["weights"] = class_weights(counts[0], balance)
            facts["train"] = fit(model, states, rows.route_labels)
            if balance == given.balance[0]:
                facts |= report_routers(model, test).model_dump()
            else:
                facts["agreement"] = route_agreement(model, test).model_dump()
            results.append(facts)
            show(facts)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if given.out is not None:
        about = header("cpu", seeds=given.seeds, epochs=given.epochs, seconds=seconds, counts=counts)
        facts = {"n_questions": len(rows), "n_test": len(test), "always_execute": always.model_dump()}
        given.out.write_text(json.dumps(about | facts | {"results": results}, indent=1))


def show(facts: dict[str, Any]) -> None:
    train, test = facts["train"], facts["agreement"]
    print(
        f"b={facts['balance']} seed {facts['seed']}: F1 train {train['macro_f1']:.3f} test {test['macro_f1']:.3f}, accuracy "
        f"{train['accuracy']:.4f} {test['accuracy']:.4f}, visits {test['visits']:.2f}, labels {test['label_visits']:.2f}",
        flush=True,
    )
    for name, cost in facts.get("costs", {}).items():
        print(
            f"    {name:<8} visits {cost['visits']:6.2f}  loss {cost['loss']:.4f}  change {cost['change']:+.4f} ± "
            f"{cost['standard_error']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
