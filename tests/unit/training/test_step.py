"""Claim: all micro-batches of an optimizer step run equally deep; outside a step, each call draws for itself."""

import pytest
import torch
from conftest import SPLIT, tiny
from torch import nn

from mull import wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
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
