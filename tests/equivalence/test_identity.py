"""One iteration of a wrapped model is the base model, bit for bit, in every family, precision and attention back end; a wrapper
that is not is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor

from mull import certify_identity, wrap_transformer_with_etd
from mull.model import base_model
from mull.model.executor import run


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.latin(2, "family", "attention", "dtype")
def test_one_iteration_gives_the_base_models_logits(
    family: str, dtype: torch.dtype, attention: str, ids: Callable[..., Tensor]
) -> None:
    base = tiny(family, dtype=dtype)
    base.set_attn_implementation(attention)
    wrapped = wrap_transformer_with_etd(base, SPLIT)
    tokens = ids(3, 70)  # longer than a chunk of the delta rule and than the sliding window
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    mask[2, 60:] = 0
    for attention_mask in (None, mask):
        for use_cache in (False, True):
            with torch.no_grad():
                expected = base(tokens, attention_mask=attention_mask, use_cache=use_cache).logits
                actual = wrapped(tokens, attention_mask=attention_mask, use_cache=use_cache, think_iterations=1).logits
            real = torch.ones_like(mask) if attention_mask is None else mask
            assert torch.equal(actual[real == 1], expected[real == 1])


def test_wrapping_keeps_the_back_ends_of_attention_and_experts() -> None:
    base = tiny("qwen3_next-moe")
    base.set_attn_implementation("eager")
    base.set_experts_implementation("eager")
    wrapped = wrap_transformer_with_etd(base, SPLIT)
    assert wrapped.model.config._attn_implementation == "eager"
    assert wrapped.model.config._experts_implementation == "eager"
    wrapped.set_attn_implementation("sdpa")
    assert wrapped.model.config._attn_implementation == "sdpa"


def test_weights_are_shared_and_keep_their_names(family: str) -> None:
    base = tiny(family)
    wrapped = wrap_transformer_with_etd(base, SPLIT)
    expected = dict(base.named_parameters())
    actual = dict(wrapped.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(actual[name] is parameter for name, parameter in expected.items())
    assert wrapped.generation_config is base.generation_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_broken_wrapper_is_refused(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_last_layer(layers: Any, kinds: Any, path: Any, *rest: Any, **options: Any) -> Tensor:
        return run(layers, kinds, path[:-1], *rest, **options)

    monkeypatch.setattr(base_model, "run", forgets_the_last_layer)
    with pytest.raises(ValueError, match="does not reproduce the base model: .* bit for bit, but differ by up to"):
        wrap_transformer_with_etd(tiny(family, dtype=dtype), SPLIT)


def test_a_change_of_one_weight_breaks_the_certificate() -> None:
    base = tiny("qwen3")
    wrapped = wrap_transformer_with_etd(base, SPLIT)
    other = tiny("qwen3")
    with torch.no_grad():
        other.model.layers[7].mlp.down_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="bit for bit"):
        certify_identity(wrapped, other)
