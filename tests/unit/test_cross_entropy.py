"""Claim: losses and gradients of the chunked projection are those of materialised fp64 logits, in fp32 and under bf16."""

import pytest
import torch
from torch import Tensor, nn

from mull.ops import cross_entropy
from mull.ops.cross_entropy import token_losses

N, D, V = 300, 16, 500


def problem(bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden, weight = torch.randn(N, D), torch.randn(V, D) * 0.5
    return hidden, weight, torch.randint(V, (N,)), torch.randn(V) if bias else None


def losses_and_gradients(*operands: Tensor | None, dtype: torch.dtype, reference: bool) -> list[Tensor]:
    hidden, weight, targets, bias = operands
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if reference:
        logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
        losses = logits.logsumexp(-1) - logits[torch.arange(N), targets]
    else:
        losses = token_losses(leaves[0], leaves[1], targets, leaves[2] if bias is not None else None)
    scale = torch.linspace(0, 1, N)  # per-target weights must reach the gradient
    return [losses.detach(), *torch.autograd.grad((losses * scale).sum(), leaves)]


@pytest.mark.parametrize("chunked", [False, True], ids=["materialised", "chunked"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    ("autocast", "tolerance"),
    # fp32: rounding of 16 products. bf16: 8 significant bits in the operands of every product.
    [(False, 1e-5), (True, 2e-2)],
    ids=["fp32", "bf16"],
)
def test_equals_fp64_logits(
    monkeypatch: pytest.MonkeyPatch, chunked: bool, bias: bool, autocast: bool, tolerance: float
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ABOVE", 0 if chunked else 2**40)
    operands = problem(bias)
    expected = losses_and_gradients(*operands, dtype=torch.float64, reference=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = losses_and_gradients(*operands, dtype=torch.float32, reference=False)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    for got, wanted in zip(actual, expected, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < tolerance
    assert float(actual[0].mean()) == pytest.approx(float(expected[0].mean()), rel=1e-3), "the logged loss is coarse"


def test_large_products_are_not_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: shapes.append(args[0].shape) or real(*args))
    monkeypatch.setattr(cross_entropy, "CHUNK_ABOVE", N * V)
    token_losses(*problem(bias=False)[:3])
    assert shapes == [(N, D)]
    monkeypatch.setattr(cross_entropy, "CHUNK_ABOVE", N * V - 1)
    token_losses(*problem(bias=False)[:3])
    assert shapes == [(N, D)]
