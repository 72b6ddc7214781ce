"""Layer routers on text: what their decisions are worth beside random routes and beside the best fixed one.

The model is the demo's looped model of Python sources, with one iteration and frozen. Routers in front of all layers learn by
themselves, straight through, from the next tokens' loss; those of sequences decide on the first 32 tokens of each row. On
held-out rows they stand beside their own decisions dealt anew to the tokens or rows, layer by layer, and beside the best route of
at most two edits that visits no more layers than the routers' mean, rounded up: chosen on 8 training rows.

    python benchmarks/text_routes.py [--seeds 3] [--steps 120] [--out FILE]
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor

import mull
from mull import ETDConfig, LayerRouterConfig
from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.model.path import from_layers
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

PROMPT = 32
EDITS = 2


def with_prompts(dataset: PackedDataset) -> PackedDataset:
    """Each row as one sequence, whose first tokens have no label."""
    labels = dataset.labels.clone()
    labels[:, :PROMPT] = -100
    positions = torch.arange(labels.shape[1]).expand_as(dataset.position_ids)
    return PackedDataset(dataset.input_ids, labels, positions)


@torch.no_grad()
def loss_of(model: Any, dataset: PackedDataset, rows: int, **options: Any) -> float:
    """Nats per labelled token."""
    total, count = 0.0, 0
    for part in torch.arange(rows).split(8):
        batch = dataset.rows(part)
        prompt = torch.arange(batch["labels"].shape[1]) < PROMPT
        out = model(
            batch["input_ids"],
            labels=batch["labels"],
            use_cache=False,
            prompt_mask=prompt.expand_as(batch["labels"]),
            **options,
        )
        n = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + float(out.loss) * n, count + n
    return total / count


@contextmanager
def dealt_anew(model: Any, seed: int) -> Iterator[None]:
    """Deal each router's decisions of a call to other tokens, or other rows."""
    generator = torch.Generator().manual_seed(seed)

    def deal(_: Any, given: Any, logits: Tensor) -> Tensor:
        if given[0].shape[-2] == model.etd_config.router.num_windows:  # [S, W, A] of sequences
            return logits[torch.randperm(len(logits), generator=generator)]
        flat = logits.flatten(0, -2)
        return flat[torch.randperm(len(flat), generator=generator)].view_as(logits)

    hooks = [router.register_forward_hook(deal) for router in model.etd.layer_routers.by_layer.values()]
    yield
    for hook in hooks:
        hook.remove()


def best_fixed(model: Any, dataset: PackedDataset, visits: float) -> list[int]:
    """The best route of a few edits, as the layers that it visits."""
    n_layers, best = len(model.model.layers), (math.inf, [0])
    for route in product(range(3), repeat=n_layers):
        layers = [layer for layer, action in enumerate(route) for _ in range(action)]
        if sum(action != 1 for action in route) <= EDITS and len(layers) <= math.ceil(visits):
            best = min(best, (loss_of(model, dataset, 8, path=from_layers(layers)), layers))
    return best[1]


def measure(seed: int, steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seed)
        loops = Loops.train(bench)
        etd = loops.looped.etd_config
        assert etd is not None, "the demo's model loops"
        text, held_out = with_prompts(loops.text.train), with_prompts(loops.text.held_out)
        n_rows, found = len(held_out), []
        for granularity in ("sequence", "token"):
            router = LayerRouterConfig(hidden_size=64, granularity=granularity, scope="all")
            config = ETDConfig.model_validate(
                etd.model_dump() | {"max_think_iterations": 1, "layer_router": router, "router_warmup_steps": 0}
            )
            torch.manual_seed(seed)
            model: Any = mull.from_pretrained(str(bench.out / "model"), etd=config)
            plain = loss_of(model, held_out, n_rows, path=from_layers(range(len(model.model.layers))))
            settings: dict[str, Any] = {"optimizer": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0, "precision": "fp32"}
            train(
                model,
                NextToken(IterationSampling(maximum=1)),
                ShuffledBatches(text, bench.size.batch_size, 1000 + seed),
                TrainConfig(steps=steps, seed=seed, trainable=("*layer_routers*",), **settings),
                bench.out / granularity,
            )
            model.eval().etd.reset_stats()
            routers = loss_of(model, held_out, n_rows)
            stats = model.etd.get_router_stats()
            counts = [stats[name] for name in ("skip_count", "execute_count", "repeat_count")]
            n_layers = len(model.model.layers)
            visits = n_layers * (counts[1] + 2 * counts[2]) / sum(counts)
            with dealt_anew(model, seed):
                random = loss_of(model, held_out, n_rows)
            layers = best_fixed(model, text, visits)
            row = {
                "seed": seed,
                "granularity": granularity,
                "plain": plain,
                "routers": routers,
                "shares": [count / sum(counts) for count in counts],
                "visits": visits,
                "dealt anew": random,
                "fixed": loss_of(model, held_out, n_rows, path=from_layers(layers)),
                "fixed layers": layers,
            }
            print(json.dumps(row), flush=True)
            found.append(row)
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = [row for seed in range(given.seeds) for row in measure(seed, given.steps)]
    if given.out is not None:
        facts = header("cpu", seconds=time.perf_counter() - started, seeds=given.seeds, steps=given.steps)
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
