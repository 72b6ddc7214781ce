"""The short form of the gated delta rule is the rule, and the state after any prefix of a call follows from its writes."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import delta_rule_reference
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from mull.ops.gated_delta import (
    convolution_window,
    no_op_where_inactive,
    replay_state,
    short_gated_delta,
    written_state,
)

ROWS, KEY_HEADS, HEADS, KEY_WIDTH, VALUE_WIDTH = 3, 2, 4, 8, 6


def inputs(
    n_tokens: int, dtype: torch.dtype = torch.float64, *, decay: float = 2.0, write: float = 2.0
) -> list[Tensor]:
    """Random queries, keys, values, log decays in [-decay, 0], write strengths in [0, write]."""
    generator = torch.Generator().manual_seed(n_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform() -> Tensor:
        return torch.rand((ROWS, n_tokens, HEADS), generator=generator, dtype=torch.float64)

    keys = (ROWS, n_tokens, KEY_HEADS, KEY_WIDTH)
    g = (-decay * uniform()).to(torch.promote_types(dtype, torch.float32))
    return [normal(*keys), normal(*keys), normal(ROWS, n_tokens, HEADS, VALUE_WIDTH), g, (write * uniform()).to(dtype)]


def past(dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (ROWS, HEADS, KEY_WIDTH, VALUE_WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("starts_empty", [True, False], ids=["empty", "continued"])
def test_outputs_and_state_are_those_of_the_paper(n_tokens: int, starts_empty: bool) -> None:
    call, state = inputs(n_tokens), torch.zeros_like(past()) if starts_empty else past()
    before = state.clone()
    out, writes = short_gated_delta(*call, state)
    expected, after = delta_rule_reference(*call, initial_state=state)
    close(out, expected, 1e-12)
    close(written_state(state, writes), after, 1e-12)
    assert torch.equal(state, before)


def test_the_state_after_every_prefix_follows_from_the_writes() -> None:
    call, state = inputs(5), past()
    _, writes = short_gated_delta(*call, state)
    prefixes = [delta_rule_reference(*(x[:, :n] for x in call), initial_state=state)[1] for n in range(1, 6)]
    states = [state, *prefixes]
    for n_keep in ([0, 0, 0], [5, 5, 5], [0, 3, 5], [1, 4, 2]):
        kept = written_state(state, writes, torch.tensor(n_keep))
        for row, n in enumerate(n_keep):
            close(kept[row], states[n][row], 1e-12)
            if n:
                replayed = replay_state(state[[row]], *(x[[row], :n] for x in call[1:]))
                close(kept[[row]], replayed, 1e-12)
    assert torch.equal(written_state(state, writes, torch.tensor([0, 0, 0])), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 4, 16])
def test_the_rules_of_transformers_agree(dtype: torch.dtype, n_tokens: int) -> None:
    """Inputs in the model's precision, computation and state in fp32, outputs in the model's precision."""
    call, state = inputs(n_tokens, dtype), past(torch.float32)
    out, writes = short_gated_delta(*call, state)
    names = ("query", "key", "value", "g", "beta")
    for rule in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        expected, after = inspect.unwrap(getattr(modeling_qwen3_5, rule))(  # mull's own wrapper may be around it
            **dict(zip(names, call, strict=True)),
            initial_state=state.clone(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        assert out.dtype == expected.dtype == dtype
        close(out, expected, 2e-6 if dtype == torch.float32 else 1e-2)
        close(written_state(state, writes), after, 5e-6)


def gradients(rule: Callable[..., tuple[Tensor, Tensor]], call: list[Tensor], state: Tensor) -> list[Tensor]:
    """Of a weighted sum of outputs and state: with respect to the five inputs and the state before them."""
    leaves = [x.detach().clone().requires_grad_(True) for x in (*call, state)]
    out, after = rule(*leaves)
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (out, after)
    )
    return list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


def ours(*call: Tensor) -> tuple[Tensor, Tensor]:
    out, writes = short_gated_delta(*call)
    return out, written_state(call[-1], writes)


def theirs(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    rule = inspect.unwrap(getattr(modeling_qwen3_5, name))
    names = ("query", "key", "value", "g", "beta", "initial_state")
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return lambda *call: rule(**dict(zip(names, call, strict=True)), **options)


@pytest.mark.parametrize("n_tokens", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("rule", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gradients_are_those_of_the_paper_and_of_transformers(n_tokens: int, rule: str) -> None:
    """transformers' rules compute in fp32."""
    call, state = inputs(n_tokens, write=1.0), past()
    expected = gradients(lambda *x: delta_rule_reference(*x[:5], initial_state=x[5]), call, state)
    for found, right in zip(gradients(ours, call, state), expected, strict=True):
        close(found, right, 1e-10)
    for found, right in zip(gradients(theirs(rule), call, state), expected, strict=True):
        close(found, right, 2e-5 * float(right.abs().max()))


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_inactive_tokens_change_neither_states_nor_the_gradients_of_others(side: str) -> None:
    """Padding, and tokens that skip a layer: the call without them gives the same."""
    call, state = inputs(9), past()
    active = torch.ones(ROWS, 9, dtype=torch.bool)
    active[:, {"left": slice(0, 3), "right": slice(6, 9), "inside": slice(3, 6)}[side]] = False

    def masked(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
        out, after = ours(query, key, value, *no_op_where_inactive(g, beta, active), state)
        return out[:, active[0]], after

    alone = gradients(ours, [x[:, active[0]] for x in call], state)
    for found, right in zip(gradients(masked, call, state), alone, strict=True):
        kept = found if found.shape == right.shape else found[:, active[0]]
        close(kept, right, 1e-12)
        if found.shape != right.shape:
            assert not found[:, ~active[0]].any()


@pytest.mark.parametrize("decay", [0.0, 30.0, 500.0])
def test_extreme_decays_neither_overflow_nor_vanish(decay: float) -> None:
    """In fp32, where exp(89) is infinite: only decays from an earlier to a later token are ever computed."""
    call, state = inputs(16, torch.float32, decay=decay), past(torch.float32)
    call[0][:, 5] = call[1][:, 5] = 0  # a token without a key has no direction
    out, writes = short_gated_delta(*call, state)
    expected, after = delta_rule_reference(*call, initial_state=state.double())
    close(out, expected, 2e-5)
    close(written_state(state, writes), after, 2e-5)
    kept = written_state(state, writes, torch.tensor([0, 7, 16]))
    assert kept.isfinite().all()
    close(kept[2], after[2], 2e-5)
    assert torch.equal(kept[0], state[0])


def test_equal_keys_written_at_full_strength_stay_accurate() -> None:
    """The worst case of the triangular system: every token contradicts all before it (OLMo Hybrid lets beta reach 2)."""
    call, state = inputs(16, torch.float32, decay=0.0), past(torch.float32)
    call[1] = call[1][:, :1].expand_as(call[1])
    call[4] = torch.full_like(call[4], 2.0)
    out, writes = short_gated_delta(*call, state)
    expected, after = delta_rule_reference(*call, initial_state=state.double())
    close(out, expected, 1e-4)
    close(written_state(state, writes), after, 1e-4)


@pytest.mark.parametrize("n_new", [[0, 1, 5], [2, 5, 0], [4, 3, 1]], ids=str)
def test_the_window_holds_the_last_inputs_of_each_row(n_new: list[int]) -> None:
    width = 4
    full = torch.arange(3 * 2 * 9, dtype=torch.float64).view(3, 2, 9)
    window = convolution_window(full, width, torch.tensor(n_new))
    for row, n in enumerate(n_new):
        assert torch.equal(window[row], full[row, :, : width + n][:, -width:])
