"""What mull relies on inside transformers, per family: how the base model calls its layers, and what the layers ask of a cache.

Identity tests notice numbers that change; these notice a new argument or cache method that the numbers of a tiny model hide.
"""

import ast
import importlib
import inspect
import textwrap
from typing import Any

import pytest
import torch
from conftest import tiny
from transformers.cache_utils import Cache

from mull import SlotCache
from mull.model.families import FAMILIES, Family, install_recurrent_hooks
from mull.model.memory import LayerMemory

LAYER_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"}
MASK_FUNCTIONS = {
    "llama": {"create_causal_mask"},
    "qwen3": {"create_causal_mask", "create_sliding_window_causal_mask"},
    "olmo3": {"create_causal_mask", "create_sliding_window_causal_mask"},
    "qwen3_next": {"create_causal_mask", "create_recurrent_attention_mask"},
    "qwen3_5_text": {"create_causal_mask", "create_recurrent_attention_mask"},
    "qwen3_5_moe_text": {"create_causal_mask", "create_recurrent_attention_mask"},
    "olmo_hybrid": {"create_causal_mask", "create_recurrent_attention_mask"},
}
CACHE_NAMES = {"past_key_values", "cache_params"}


def calls_in(function: Any) -> list[ast.Call]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def test_the_base_model_calls_its_layers_as_mull_does(family: str) -> None:
    calls = [call for call in calls_in(type(tiny(family).model).forward) if name_of(call) == "decoder_layer"]
    assert len(calls) == 1
    given = {keyword.arg for keyword in calls[0].keywords if keyword.arg is not None}
    # Olmo3's layers do not take use_cache and swallow it.
    assert given | {"use_cache"} == LAYER_ARGUMENTS
    assert [ast.unparse(argument) for argument in calls[0].args] == ["hidden_states"]


def test_the_base_model_makes_the_masks_that_mull_makes(family: str) -> None:
    model = tiny(family)
    made = {name_of(call) for call in calls_in(type(model.model).forward) if "mask" in name_of(call)}
    assert made == MASK_FUNCTIONS[model.config.model_type]


def test_layers_ask_the_cache_only_for_what_a_view_answers(family: str) -> None:
    asked = set()
    classes = {type(module) for module in tiny(family).model.layers.modules()}
    for cls in classes:
        if not cls.__module__.startswith("transformers.models"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in CACHE_NAMES:
                asked.add(node.attr)
    assert "update" in asked
    assert asked <= set(dir(LayerMemory)), "a layer asks its cache for something new"


@pytest.mark.parametrize("family_name", ["qwen3_next-dense", "qwen3_5", "qwen3_5-moe", "olmo_hybrid"])
def test_recurrent_layers_hand_keywords_on_to_the_delta_rule(family_name: str) -> None:
    model = tiny(family_name)
    mixer = model.model.layers[0].linear_attn
    rules = [call for call in calls_in(type(mixer).forward) if name_of(call).endswith("gated_delta_rule")]
    assert {name_of(call) for call in rules} == {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}
    for call in rules:
        assert [ast.unparse(argument) for argument in call.args] in (["query", "key", "value"], ["q", "k", "v"])
        keywords = {keyword.arg for keyword in call.keywords}
        assert keywords == {
            "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens", None
        }  # fmt: skip


@pytest.mark.parametrize("name", [family.delta_rule_module for family in FAMILIES.values() if family.delta_rule_module])
def test_without_a_view_the_delta_rules_are_transformers_own(name: str) -> None:
    install_recurrent_hooks(Family(rotary=lambda *_: {}, delta_rule_module=name))
    module = importlib.import_module(f"transformers.models.{name}")
    query, key, value = (torch.randn(2, 70, 4, 8) for _ in range(3))
    inputs = {"g": -torch.rand(2, 70, 4), "beta": torch.rand(2, 70, 4), "use_qk_l2norm_in_kernel": True}
    for rule in (module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule):
        assert hasattr(rule, "adapted_by_mull")
        expected = inspect.unwrap(rule)(query, key, value, **inputs)[0]
        assert torch.equal(rule(query, key, value, **inputs)[0], expected)


def test_slot_cache_overrides_exist_in_transformers() -> None:
    """A renamed method of `Cache` would turn our override into dead code."""
    overrides = {name for name in vars(SlotCache) if not name.startswith("_")} - {
        "bind",
        "advance",
        "has_gaps",
        "known",
        "no_keys",
        "append",
        "replace",
        "note_known",
    }
    assert overrides
    assert overrides <= set(dir(Cache))
