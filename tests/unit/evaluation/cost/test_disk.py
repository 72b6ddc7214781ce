"""Claim: what a run leaves on the disk is known before it starts."""

from typing import Any

import pytest
import torch
from conftest import tiny

from mull.evaluation.cost.disk import Saving, disk_rows, in_bytes
from mull.layers.value_head import ValueHead
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.checkpoint import CheckpointConfig


@pytest.mark.parametrize(
    ("config", "steps", "kept"),
    [
        ({}, 10, 1),
        ({}, None, 1),
        ({"every": 4}, 10, 2),
        ({"every": 4}, 4, 1),
        ({"every": 4, "keep_last": None}, 10, 3),
        ({"every": 4, "keep_last": 5}, 10, 3),
        ({"every": 4, "keep_last": 5}, None, 5),
        ({"every": 4, "keep_last": None}, None, None),
    ],
)
def test_a_stage_keeps_the_checkpoints_that_it_makes_and_no_more_than_allowed(
    config: Any, steps: int | None, kept: int | None
) -> None:
    assert Saving(CheckpointConfig(**config), steps, 0).n_kept == kept


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
def test_models_and_checkpoints_are_counted_to_the_byte(family: str) -> None:
    model = wrap_transformer_with_etd(tiny(family), None, MTPConfig(mtp_head_type="mlp")).to(torch.bfloat16)
    head = ValueHead(32)
    trunk = 2 * sum(p.numel() for p in tiny(family).parameters())
    whole = 2 * sum(p.numel() for p in model.parameters()) + 4 * sum(p.numel() for p in head.parameters())
    stages = [Saving(CheckpointConfig(keep_last=1), 10, 0), Saving(CheckpointConfig(every=4), 10, 5000)]
    assert list(disk_rows(model, head, stages)) == [
        ("disk", f"{in_bytes(4 * whole + 10000 + trunk)}, and a checkpoint more while one is written"),
        ("  checkpoints", f"1 of {in_bytes(whole)}"),
        ("  checkpoints", f"2 of {in_bytes(whole + 5000)}"),
        ("  model", in_bytes(whole)),
        ("  trunk", in_bytes(trunk)),
    ]
