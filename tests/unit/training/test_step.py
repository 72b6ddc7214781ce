"""Claim: all micro-batches of an optimizer step run equally deep; outside a step, each call draws for itself.

A micro-batch without targets adds nothing to its step; a step without targets is refused.
"""

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn

from mull import wrap_transformer_with_etd
from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.training.loop import TrainConfig, train
from mull.training.objectives.base import Objective
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Resources
from mull.training.objectives.step_supervision import StepSupervision
from mull.training.objectives.table import make_objective
from mull.training.objectives.weightings import ReturnConfig
from mull.training.step import DistributedConfig, shard


def test_one_draw_serves_a_step() -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    tokens = torch.arange(3, 13)[None]
    result = train(
        model,
        NextToken(IterationSampling(kind="uniform", maximum=4)),
        lambda index: {"input_ids": tokens, "labels": tokens},
        TrainConfig(steps=6, accumulate=4, log_every=1, precision="fp32"),
    )
    depths = [record["iterations"] for record in result.history]  # averaged over the micro-batches of a step
    assert all(depth.is_integer() for depth in depths)
    assert len(set(depths)) > 1


def test_calls_outside_a_step_draw_for_themselves() -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    tokens = torch.arange(3, 13)[None]
    batch = {"input_ids": tokens, "labels": tokens}
    objective = NextToken(IterationSampling(kind="uniform", maximum=4))
    plan = objective.plan_step(model, [batch])
    inside = {objective.loss(model, plan, 0).metrics["iterations"] for _ in range(20)}
    outside = {objective(model, batch).metrics["iterations"] for _ in range(20)}
    assert len(inside) == 1
    assert len(outside) > 1


def test_weights_of_several_types_are_not_shared() -> None:
    root = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])
    with pytest.raises(ValueError, match=r"torch.float32, torch.float64.* one type only"):
        shard(root, [], [], DistributedConfig())


OBJECTIVES = ["next-token", "baseline-mtp", "value-head", "step supervision"]


def objective_named(name: str, model: MullForCausalLM) -> Objective:
    torch.manual_seed(1)
    if name == "step supervision":
        return StepSupervision(IterationSampling(maximum=2))
    resources = Resources(model=model, iterations=IterationSampling(maximum=2), value_head=ValueHead(32))
    return make_objective(name, resources, ReturnConfig() if name == "value-head" else None)


def micro_batch(targets: bool) -> dict[str, Tensor]:
    tokens = torch.arange(3, 13)[None]
    labels = tokens if targets else torch.full_like(tokens, -100)
    steps = labels[..., None].expand(-1, -1, 2)
    return {"input_ids": tokens, "labels": labels, "rewards": torch.ones(1, 10), "step_labels": steps}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_batch_without_targets_adds_nothing(name: str) -> None:
    """Neither to the gradient nor to what is logged, wherever in the step it is."""
    found = []
    for accumulate, has_targets in (
        (1, lambda _: True),
        (2, lambda number: number % 2 == 0),
        (2, lambda n: n % 2 == 1),
    ):
        model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
        objective = objective_named(name, model)
        config = TrainConfig(steps=2, accumulate=accumulate, log_every=1, precision="fp32", warmup_steps=0)
        history = train(model, objective, lambda n, has=has_targets: micro_batch(has(n)), config).history
        trained = model if objective.companion is None else objective.companion
        found.append((trained.state_dict(), history))
    (expected, once), *others = found
    for weights, history in others:
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, atol=1e-6, rtol=0)
        for record, other in zip(history, once, strict=True):
            unlike = {"seconds", "tokens", "tokens_per_second"}
            assert record == pytest.approx(other | {key: record[key] for key in unlike}, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_without_targets_is_refused(name: str) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    config = TrainConfig(steps=1, accumulate=2, precision="fp32")
    with pytest.raises(ValueError, match="No label of shape|has a label"):
        train(model, objective_named(name, model), lambda _: micro_batch(False), config)
