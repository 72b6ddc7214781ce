"""What training differentiates is exact: with and without checkpointing, truncated, and early-decoded at every iteration."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import MullForCausalLM, wrap_transformer_with_etd

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]


def gradients(model: MullForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=tolerance, rtol=0, msg=f"gradient of {name}")


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.latin(6, "family", "use_reentrant", "packed")
def test_checkpointing_changes_no_gradient(
    family: str, use_reentrant: bool, packed: bool, exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT).train()
    tokens = ids(2, 17)
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None] if packed else None
    options = {"labels": tokens, "think_iterations": 3, "position_ids": positions, "use_cache": False}
    expected = gradients(model, model(tokens, **options).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    recomputed = []
    layer = model.model.layers[3]
    layer.mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    actual = gradients(model, model(tokens, **options).loss)
    assert len(recomputed) == 6, "three visits, each computed once more in the backward pass"
    assert_same(actual, expected)


def test_recomputed_layers_fill_no_cache(ids: Ids) -> None:
    """A cache that layers drop while they are checkpointed would claim tokens that it does not hold."""
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT).train()
    assert model(ids(1, 5)).past_key_values.get_seq_length() == 5
    model.gradient_checkpointing_enable()
    assert model(ids(1, 5)).past_key_values is None
    assert model.eval()(ids(1, 5)).past_key_values.get_seq_length() == 5


def test_early_decoding_is_a_shorter_path(family: str, exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens = ids(2, 17)
    states = model.hidden_states_by_iteration(tokens, think_iterations=3)
    assert len(states) == 3
    for iteration, state in enumerate(states, start=1):
        expected = model(tokens, think_iterations=iteration, use_cache=False).logits
        assert torch.equal(model.lm_head(state), expected)
    assert torch.equal(model.hidden_states(tokens, think_iterations=3), states[-1])


@pytest.mark.parametrize("backprop", [1, 2, 3, 9])
@pytest.mark.latin(8, "family", "backprop")
def test_truncated_back_propagation_cuts_the_loop(family: str, backprop: int, exact: Exact, ids: Ids) -> None:
    """Reference: the same path with the state detached by hand, run through transformers' layers one visit at a time."""
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens = ids(2, 11)
    state = model.hidden_states(tokens, think_iterations=3, backprop_iterations=backprop)
    actual = gradients(model, state.square().sum())

    cut = model.config.etd["n_encoder_layers"] + (3 - backprop) * 4 if backprop < 3 else 0

    def detach_before(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        visits.append(1)
        return (args[0].detach(), *args[1:]) if len(visits) - 1 == cut and cut else None

    visits: list[int] = []
    hooks = [layer.register_forward_pre_hook(detach_before) for layer in model.model.layers]
    states = model(tokens, think_iterations=3, use_cache=False, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert torch.equal(states[-1], state)
    assert_same(actual, gradients(model, states[-1].square().sum()))
    has_encoder_gradient = any("layers.0." in name for name in actual)
    assert has_encoder_gradient == (backprop >= 3)
