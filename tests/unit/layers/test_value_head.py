"""Claim: a value head starts at zero, computes in full precision, and learns what the state before each target is worth."""

import pytest
import torch

from mull.layers.value_head import ValueHead, value_loss


def test_every_value_is_zero_at_the_start() -> None:
    assert torch.equal(ValueHead(8)(torch.randn(2, 5, 8)), torch.zeros(2, 5))


def trained_head() -> ValueHead:
    head = ValueHead(8)
    torch.nn.init.normal_(head.out.weight)
    torch.nn.init.normal_(head.out.bias)
    return head


def test_values_are_the_formula() -> None:
    head, hidden = trained_head(), torch.randn(2, 5, 8)
    inner = hidden @ head.inner.weight.T + head.inner.bias
    expected = (inner * inner.sigmoid()) @ head.out.weight[0] + head.out.bias
    torch.testing.assert_close(head(hidden), expected)


def test_neither_autocast_nor_the_dtype_of_the_weights_costs_precision() -> None:
    head, hidden = trained_head().bfloat16(), torch.randn(2, 5, 8).bfloat16()
    expected = head.double()(hidden.double())
    assert expected.dtype == torch.float64
    head = head.bfloat16()  # exact: the weights were bf16 numbers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_compares_the_value_before_a_target_with_its_return() -> None:
    values, returns = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    valid = torch.rand(3, 6) < 0.5
    valid[:, 0] = False
    expected = sum(float((values[b, j - 1] - returns[b, j]).detach() ** 2) for b, j in valid.nonzero().tolist())
    loss = value_loss(values, returns, valid)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert returns.grad is None
    assert values.grad is not None
    assert torch.equal(values.grad != 0, valid.roll(-1, 1)), "only the states before targets are taught"


def test_padding_of_any_value_leaves_loss_and_gradient_finite() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan, torch.inf]], requires_grad=True)
    loss = value_loss(
        values, torch.tensor([[torch.nan, 3.0, 5.0, torch.nan]]), torch.tensor([[False, True, True, False]])
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4 + 9)
    assert values.grad is not None
    assert values.grad.tolist() == [[-4.0, -6.0, 0.0, 0.0]]


def test_a_head_learns_outcomes_from_states_that_reveal_them() -> None:
    head = ValueHead(16)
    hidden = torch.randn(64, 4, 16)
    outcomes = (hidden[:, :, :1].mean(1) > 0).float().expand(-1, 4)
    hidden = hidden + 2 * outcomes[..., None] * torch.ones(16) - 1
    valid = torch.tensor([False, True, True, True]).expand(64, -1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = value_loss(head(hidden), outcomes, valid) / valid.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 < losses[0]


def test_a_width_without_room_for_an_inner_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="width=1 must be at least 2"):
        ValueHead(1)
