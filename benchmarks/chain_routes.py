"""Layer routers where the right route differs from prompt to prompt: following a chain for as many hops as the prompt says.

A small looped model learns to follow one edge per iteration. Its think layer is then written out three times, so that a route
of three actions (0 skips, 1 runs, 2 repeats a layer) follows 0 to 6 edges. The first tokens of each prompt say how many, 1 to 6.
The model is frozen, and routers of sequences learn by themselves (straight through, Gumbel) or from labels. On fresh prompts they
stand beside their own decisions dealt anew to the prompts, layer by layer, and beside the best fixed route that is not cheaper.

    python benchmarks/chain_routes.py [--seeds 3] [--out FILE]
"""

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mull import ETDConfig, LayerRouterConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.app.demo.chain import chain_model
from mull.app.demo.chapter import Bench
from mull.data.chain import ChainTask
from mull.model.executor import run
from mull.model.inputs import new_tokens
from mull.training.objectives.base import StepPlan
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.routing import Routing, RoutingConfig, class_weights
from mull.training.objectives.step_supervision import StepSupervision

N_LAYERS, MOST = 3, 6
PREFIX = 3
"""How often the number of hops is said: the first token is an attention sink, whose state hardly tells numbers apart."""

WAYS = ("straight through", "gumbel", "supervised")


class Numbered(ChainTask):
    """The chain task with a token for each number of hops."""

    @property
    def vocab_size(self) -> int:
        """Those of the task, and the numbers 1 to `MOST`."""
        return self.n_nodes + 2 + MOST

    def batches(self, batch_size: int, seed: int, train: bool = True) -> Callable[[int], dict[str, Tensor]]:
        """Batches of the task with numbers in them, and ``asked [B]``."""
        plain = ChainTask.batches(self, batch_size, seed, train)

        def batch(index: int) -> dict[str, Tensor]:
            found = plain(index)
            generator = torch.Generator().manual_seed(2 * index + train + 1000 * seed)
            asked = torch.randint(1, MOST + 1, (batch_size,), generator=generator)
            number = (self.n_nodes + 1 + asked)[:, None]
            mask = F.pad(found["attention_mask"], (PREFIX, 0), value=True)  # everybody sees it
            causal = torch.ones(PREFIX, mask.shape[-1], dtype=torch.bool).tril().expand(batch_size, 1, -1, -1)
            return {
                "input_ids": torch.cat([number.expand(-1, PREFIX), found["input_ids"]], 1),
                "labels": F.pad(found["labels"], (PREFIX, 0), value=-100),
                "step_labels": F.pad(found["step_labels"], (0, 0, PREFIX, 0), value=-100),
                "hops": F.pad(found["hops"], (PREFIX, 0), value=-1),
                "position_ids": torch.cat(
                    [torch.arange(PREFIX).expand(batch_size, -1), found["position_ids"] + PREFIX], 1
                ),
                "attention_mask": torch.cat([causal, mask], 2),
                "asked": asked,
            }

        return batch


def looped(task: Numbered, seed: int, steps: int) -> MullForCausalLM:
    """A model that follows one edge per iteration."""
    model = chain_model(task, seed)
    with torch.no_grad():  # Smaller ones are cancelled by the layers, which have no use for numbers. Only routers have.
        model.model.embed_tokens.weight[-MOST:].normal_(std=3.0)
    objective = StepSupervision(IterationSampling(kind="uniform", minimum=2, maximum=task.max_train_hops))
    settings: dict[str, Any] = {"schedule": "wsd", "decay_share": 0.4, "weight_decay": 0.0, "precision": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        batches = task.batches(32, seed)
        Bench(Path(folder), seed).train("chain", model, objective, batches, steps=steps, peak_lr=2e-3, **settings)
    return model.eval()


def routed(model: MullForCausalLM, way: str) -> MullForCausalLM:
    """The model with its think layer three times, frozen, and new routers."""
    config = copy.deepcopy(model.config.get_text_config())
    config.num_hidden_layers, config.layer_types = 1 + N_LAYERS, ["full_attention"] * (1 + N_LAYERS)
    base = AutoModelForCausalLM.from_config(config)
    base.load_state_dict(
        {
            name.replace("layers.1.", f"layers.{layer}."): value
            for name, value in model.state_dict().items()
            for layer in (range(1, 1 + N_LAYERS) if "layers.1." in name else [0])
        }
    )
    etd = ETDConfig(
        n_encoder_layers=1,
        n_think_layers=N_LAYERS,
        n_decoder_layers=0,
        max_think_iterations=1,
        layer_router=LayerRouterConfig(hidden_size=64, use_gumbel=way == "gumbel"),
        router_warmup_steps=0,
    )
    wrapped = wrap_transformer_with_etd(base, etd)
    wrapped.requires_grad_(False)
    assert wrapped.etd is not None
    wrapped.etd.requires_grad_(True)
    return wrapped


def answers(model: MullForCausalLM, batch: dict[str, Tensor], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits ``[B, N, V]`` at the queries, and the actions ``[B, L]`` of the routers, or those that are given."""
    trunk = model.model
    h = trunk.embed_tokens(batch["input_ids"])
    inputs = trunk.layer_inputs(h, batch["attention_mask"], batch["position_ids"])
    prompt = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    prompt[:, :PREFIX] = True
    wide = None if given is None else torch.cat([torch.ones_like(given[:, :1]), given], 1)
    policy = trunk.with_routing(None, h, inputs, new_tokens(batch["attention_mask"], h), prompt, given=wide)
    assert policy is not None
    h = trunk.norm(run(trunk.layers, trunk.kinds, trunk.path(1), h, inputs, policy=policy))
    queries = batch["step_labels"][..., 0] >= 0
    actions = torch.stack([made[:, 0] for made in policy.metrics()["router_actions"]], 1)
    return model.lm_head(h[queries].view(len(h), -1, h.shape[-1])), actions


def targets(batch: dict[str, Tensor]) -> Tensor:
    """``[B, N]``: the node that is as many hops away as the prompt asks."""
    steps = batch["step_labels"][batch["step_labels"][..., 0] >= 0].view(len(batch["asked"]), -1, MOST + 1)
    index = (batch["asked"] - 1)[:, None, None].expand(-1, steps.shape[1], 1)
    return steps.gather(2, index)[..., 0]


def labels(asked: Tensor) -> Tensor:
    """The route ``[B, L]`` with so many visits that repeats as early as it can."""
    left, actions = asked, []
    for _ in range(N_LAYERS):
        actions.append(left.clamp(max=2))
        left = left - actions[-1]
    return torch.stack(actions, 1)


def train(model: MullForCausalLM, task: Numbered, way: str, steps: int, seed: int) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = task.batches(32, 100 + seed, train=False)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    counts = labels(torch.arange(1, MOST + 1)).flatten().bincount(minlength=3).tolist()
    objective = Routing(
        model.etd.layer_routers,
        IterationSampling(maximum=1),
        RoutingConfig(),
        class_weights([100 * count for count in counts], RoutingConfig().balance),
    )
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        batch = batches(step)
        if way == "supervised":
            start = torch.tensor([[-100] * PREFIX + [0]]).expand(len(batch["asked"]), -1)  # the number is the prompt
            route = torch.cat([torch.ones_like(batch["asked"])[:, None], labels(batch["asked"])], 1)
            rows = {"input_ids": batch["input_ids"][:, : PREFIX + 1], "labels": start, "route_labels": route}
            found = objective.loss(model, StepPlan(batches=[rows]), 0)
            loss = found.sum / found.weight
        else:
            logits, _ = answers(model, batch)
            loss = F.cross_entropy(logits.flatten(0, 1), targets(batch).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def measure(model: MullForCausalLM, task: Numbered, seed: int) -> dict[str, Any]:
    """Shares of right answers on fresh prompts: routers, their decisions dealt anew, the best fixed route of their cost.

    Only the nodes farthest from the roots are asked: from them, every number of hops leads to another node.
    """
    batch = task.batches(256, 500 + seed, train=False)(0)
    wanted, far = targets(batch), batch["hops"][batch["step_labels"][..., 0] >= 0].view(256, -1) == task.max_hops

    def right(given: Tensor | None) -> tuple[float, Tensor]:
        logits, actions = answers(model, batch, given)
        return float((logits.argmax(-1) == wanted)[far].double().mean()), actions

    accuracy, actions = right(None)
    visits = float(actions.sum(1).double().mean())
    generator = torch.Generator().manual_seed(seed)
    dealt = [
        right(torch.stack([column[torch.randperm(len(column), generator=generator)] for column in actions.T], 1))[0]
        for _ in range(8)
    ]
    # Rounded up: the fixed route may cost more than the routers' mean.
    routes = [route for route in product(range(3), repeat=N_LAYERS) if sum(route) <= math.ceil(visits)]
    fixed = {route: right(torch.tensor(route).expand(len(wanted), -1))[0] for route in routes}
    best = max(fixed, key=lambda route: fixed[route])
    exact = right(labels(batch["asked"]))[0]
    return {
        "routers": accuracy,
        "visits": visits,
        "dealt anew": sum(dealt) / len(dealt),
        "fixed": fixed[best],
        "fixed route": best,
        "labelled routes": exact,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task, rows, started = Numbered(), [], time.perf_counter()
    for seed in range(given.seeds):
        model = looped(task, seed, given.base_steps)
        for way in WAYS:
            torch.manual_seed(seed)
            student = routed(model, way)
            train(student, task, way, given.steps, seed)
            row = {"seed": seed, "way": way, **measure(student, task, seed)}
            rows.append(row)
            print(
                f"seed {seed} {way:<17} routers {row['routers']:.3f} at {row['visits']:.2f} visits, dealt anew "
                f"{row['dealt anew']:.3f}, fixed {row['fixed route']} {row['fixed']:.3f}, labelled {row['labelled routes']:.3f}",
                flush=True,
            )
    if given.out is not None:
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        facts = header("cpu", seconds=time.perf_counter() - started, **settings)
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
