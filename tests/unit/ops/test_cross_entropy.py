"""Claim: weighted losses, statistics and gradients of the chunked projection are those of materialised fp64 logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mull.ops import cross_entropy
from mull.ops.cross_entropy import cross_entropy_gradients, token_statistics, weighted_cross_entropy

N, D, V = 300, 16, 500


@pytest.fixture(params=[(2**22, 256), (7 * V, 1), (V - 1, 1)], ids=["one-chunk", "7-rows", "1-row"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """N is no multiple of 7: the last chunk is short."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param[0])
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", request.param[1])


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients differ per target, some are zero and some negative: policy gradients need these."""
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * 0.5
    coefficients = torch.linspace(-0.5, 1, N, dtype=torch.promote_types(dtype, torch.float32))
    coefficients[::9] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,)), coefficients


def from_logits(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> list[Tensor]:
    """Sum, losses, and gradients of hidden states and weight in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    total = (losses * coefficients.double()).sum()
    return [total.detach(), losses.detach(), *torch.autograd.grad(total, (hidden, weight))]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance", "tolerance_of_losses"),
    [
        (torch.float64, False, 1e-14, 1e-14),
        (torch.float32, False, 1e-6, 1e-6),
        # 8 significant bits in the operands of every product; the softmax is fp32, so losses keep more.
        (torch.float32, True, 8e-3, 2e-3),
        (torch.bfloat16, False, 8e-3, 2e-3),
        (torch.float16, False, 2e-3, 2e-4),
    ],
    ids=["fp64", "fp32", "bf16-autocast", "bf16", "fp16"],
)
def test_equals_fp64_logits(dtype: torch.dtype, autocast: bool, tolerance: float, tolerance_of_losses: float) -> None:
    hidden, weight, targets, coefficients = problem(dtype)
    expected = from_logits(hidden, weight, targets, coefficients)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total, losses = weighted_cross_entropy(hidden, weight, targets, coefficients)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total.dtype == losses.dtype == coefficients.dtype
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    assert relative_error(total.detach(), expected[0]) < tolerance_of_losses
    assert relative_error(losses, expected[1]) < tolerance_of_losses
    assert relative_error(gradients[0], expected[2]) < tolerance
    assert relative_error(gradients[1], expected[3]) < tolerance


@pytest.mark.usefixtures("_chunk")
def test_the_upstream_gradient_scales_both_gradients() -> None:
    hidden, weight, targets, coefficients = problem()
    expected = from_logits(hidden, weight, targets, coefficients)
    (weighted_cross_entropy(hidden, weight, targets, coefficients)[0] * -3).backward()
    torch.testing.assert_close(hidden.grad, -3 * expected[2])
    torch.testing.assert_close(weight.grad, -3 * expected[3])


@pytest.mark.usefixtures("_chunk")
def test_calls_share_one_gradient_of_the_weight() -> None:
    """It is complete after the forward pass, and autograd has none beside it."""
    hidden, weight, targets, coefficients = problem()
    expected = from_logits(hidden, weight, targets, coefficients)
    shared = torch.ones_like(weight)
    for part in (slice(0, 100), slice(100, N)):
        total, _ = weighted_cross_entropy(hidden[part], weight, targets[part], coefficients[part], shared)
        total.backward()
    torch.testing.assert_close(shared, 1 + expected[3])
    torch.testing.assert_close(hidden.grad, expected[2])
    assert weight.grad is None


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    hidden, weight, targets, coefficients = problem()
    expected = from_logits(hidden, weight, targets, coefficients)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        total, losses = weighted_cross_entropy(hidden, weight, targets, coefficients)
    torch.testing.assert_close(losses, expected[1])
    torch.testing.assert_close(total.detach(), expected[0])
    assert not losses.requires_grad
    assert total.requires_grad == (frozen in ("hidden", "weight"))
    if total.requires_grad:
        total.backward()
    assert (hidden.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "hidden")
    for tensor, gradient in ((hidden, expected[2]), (weight, expected[3])):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient)


def test_without_rows_the_sum_is_zero_and_so_is_the_gradient() -> None:
    hidden, weight, targets, coefficients = problem()
    total, losses = weighted_cross_entropy(hidden[:0], weight, targets[:0], coefficients[:0])
    total.backward()
    assert total == 0
    assert losses.shape == (0,)
    assert not weight.grad.any()
    assert token_statistics(hidden[:0], weight, targets[:0], weight).alignment.shape == (0,)


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    hidden, weight, targets, coefficients = problem()
    total, _ = weighted_cross_entropy(hidden, weight, targets, coefficients)
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_losses_of_certain_and_impossible_targets_are_finite() -> None:
    """A loss of 400 nats is beyond what a probability in fp32 can hold."""
    hidden, weight = torch.eye(2) * 20, torch.tensor([[10.0, 0.0], [-10.0, 0.0]])
    _, losses = weighted_cross_entropy(hidden[[0, 0]].requires_grad_(), weight, torch.tensor([0, 1]), torch.ones(2))
    assert losses.tolist() == [0.0, 400.0]


@pytest.mark.usefixtures("_chunk")
def test_statistics_are_those_of_the_distributions() -> None:
    hidden, weight, targets, _ = problem()
    direction = torch.randn_like(weight)
    statistics = token_statistics(hidden, weight, targets, direction)
    prediction = torch.distributions.Categorical(logits=hidden @ weight.T)
    torch.testing.assert_close(statistics.loss, -prediction.log_prob(targets).detach())
    torch.testing.assert_close(statistics.entropy, prediction.entropy().detach())
    torch.testing.assert_close(statistics.sum_of_squares, prediction.probs.square().sum(-1).detach())
    assert token_statistics(hidden, weight, targets).alignment is None
    for n in (0, 6, 7, N - 1):
        loss = F.cross_entropy(hidden[n] @ weight.T, targets[n])
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(statistics.alignment[n], (gradient * direction).sum())
    assert not any(tensor.requires_grad for tensor in statistics)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("rows", [1, 64])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", rows)
    hidden, weight, targets, coefficients = problem()
    with LargestTensor() as allocated:
        weighted_cross_entropy(hidden, weight, targets, coefficients)[0].backward()
        token_statistics(hidden, weight, targets, weight)
        cross_entropy_gradients(hidden, weight, targets, coefficients, None)
    assert allocated.size == max(rows * V, V * D)


def test_the_forward_pass_takes_three_products_and_none_without_gradient_more_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weight's product is skipped for a frozen weight, and recomputing logits would be a fourth."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2**40)
    hidden, weight, targets, coefficients = problem()
    counts = []
    for weight_frozen, grad in ((False, True), (True, True), (False, False)):
        with Products() as products, torch.set_grad_enabled(grad):
            total, _ = weighted_cross_entropy(
                hidden, weight.detach() if weight_frozen else weight, targets, coefficients
            )
            if grad:
                total.backward()
        counts.append(products.count)
    assert counts == [3, 2, 1]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))
