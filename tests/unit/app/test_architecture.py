"""Claim: sizes that do not fit each other are refused by name before any data is read, and those that fit are not."""

from typing import Any

import pytest
from conftest import COMMON, FAMILIES
from recipes import ARCHITECTURE

from mull.app.architecture import make_config, try_config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_without_weights(family: str) -> None:
    kind, changes = FAMILIES[family]
    common = {name: value for name, value in COMMON.items() if name != "head_dim" or not kind.startswith("olmo")}
    if kind == "qwen3_5_moe_text":
        del common["intermediate_size"]
    try_config(make_config({"model_type": kind, **common, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        {"hidden_act": "relu9"},
        {"rope_parameters": {"rope_type": "none", "rope_theta": 1e4}},
        {"head_dim": 15},
        {"layer_types": ["full_attention"]},
    ],
)
def test_values_that_do_not_fit_each_other_are_one_sentence(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^architecture(:| makes no model that runs:)") as error:
        try_config(make_config({**ARCHITECTURE, **changes}))
    assert "\n" not in str(error.value)
