"""Cross-entropy of a vocabulary projection, in bounded memory.

No function here keeps the logits of all targets: rows are projected in chunks. The gradient is computed while a chunk's logits
exist. That takes three matrix products, where recomputing the logits in the backward pass would take four.

Shapes: N targets, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 2**22
"""Logits (rows · V) of a chunk: 16 MiB in fp32."""

MIN_CHUNK_ROWS = 256
"""Smallest number of rows in a chunk, so that matrix products stay efficient with a large vocabulary."""


def weighted_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    coefficients: Float[Tensor, " N"],
    weight_gradient: Float[Tensor, "V D"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """``Σ_n coefficients_n · -ln softmax(hidden_n · weightᵀ)[target_n]``, and each target's loss.

    Drop rows whose coefficient is 0 before the call: they cost time and change nothing.

    Args:
        hidden: Final-normed hidden states, one row per target.
        weight: Unembedding matrix.
        targets: Vocabulary indices.
        coefficients: Weight of each target. No gradient flows into them.
        weight_gradient: The gradient with respect to `weight`, for an upstream gradient of 1, is added to this matrix immediately
            instead of going through autograd, so that several calls share one. Use fp32 for half-precision weights, or the many
            small terms are rounded away.

    Returns:
        The sum, differentiable once with respect to `hidden` and `weight`, and one detached loss per target in nats; both
        fp32, or fp64 for fp64 operands. Under autocast the matrix products run in its dtype, the softmax in fp32.
    """
    total, losses = _WeightedCrossEntropy.apply(
        hidden, weight, targets, coefficients, weight_gradient, torch.is_grad_enabled()
    )
    return total, losses


class _WeightedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        coefficients: Tensor,
        weight_gradient: Tensor | None,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        if not differentiable or not (any(ctx.needs_input_grad) or weight_gradient is not None):
            losses = _losses(hidden, weight, targets)
            return (losses * coefficients).sum(), losses
        shared = weight_gradient is not None
        if not shared and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=accurate(weight.dtype))
        losses, hidden_gradient = cross_entropy_gradients(hidden, weight, targets, coefficients, weight_gradient)
        own = None if shared or weight_gradient is None else weight_gradient.to(weight.dtype)
        ctx.save_for_backward(hidden_gradient.to(hidden.dtype), own)
        ctx.mark_non_differentiable(losses)
        return (losses * coefficients).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient * upstream.to(hidden_gradient.dtype),
            None if weight_gradient is None else weight_gradient * upstream.to(weight_gradient.dtype),
            *(None,) * 4,
        )


def cross_entropy_gradients(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    coefficients: Float[Tensor, " N"],
    weight_gradient: Float[Tensor, "V D"] | None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N D"]]:
    """Losses of the targets, fp32 in nats, and the gradient of their weighted sum with respect to `hidden`, in one pass.

    Arguments are those of `weighted_cross_entropy`. Without `weight_gradient`, the gradient of `weight` is not computed. The
    gradient of `hidden` has the dtype of the matrix products.
    """
    losses = torch.empty(len(targets), dtype=accurate(hidden.dtype), device=hidden.device)
    hidden, weight = operands(hidden, weight)
    # The coefficients multiply rows of width D, not of width V.
    factors = coefficients[:, None].to(hidden.dtype)
    scaled, hidden_gradient = hidden * factors, torch.empty_like(hidden)
    for rows, log_p in _chunks(hidden, weight):
        picked = targets[rows, None]
        losses[rows] = -log_p.gather(-1, picked)[:, 0]
        error = log_p.exp_()  # p - onehot(target)
        error.scatter_add_(-1, picked, error.new_full(picked.shape, -1.0))
        error = error.to(weight.dtype)
        torch.mm(error, weight, out=hidden_gradient[rows])
        if weight_gradient is not None:
            add_product(weight_gradient, error.T, scaled[rows])
    return losses, hidden_gradient.mul_(factors)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    losses = torch.empty(len(targets), dtype=accurate(hidden.dtype), device=hidden.device)
    for rows, log_p in _chunks(*operands(hidden, weight)):
        losses[rows] = -log_p.gather(-1, targets[rows, None])[:, 0]
    return losses


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to `total`, which may have a more accurate type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class TokenStatistics(NamedTuple):
    """Statistics of a model's prediction of each target."""

    loss: Tensor
    """``[N]`` fp32: ``-ln p(target)`` in nats."""

    entropy: Tensor
    """``[N]`` fp32: entropy of the prediction in nats."""

    sum_of_squares: Tensor
    """``[N]`` fp32: ``Σ_v p(v)²``."""

    alignment: Tensor | None
    """``[N]`` fp32: ``(p - onehot(target))ᵀ · direction · hidden``, the inner product of `direction` and this target's gradient
    of the unembedding; None without a `direction`."""


@torch.no_grad()
def token_statistics(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    direction: Float[Tensor, "V D"] | None = None,
) -> TokenStatistics:
    """Measure predictions without gradient, and without keeping their logits.

    Args:
        direction: Gradient of the unembedding to compare each target's own gradient with. Each is an outer product of error and
            hidden state, so no gradient per target is formed.
    """
    measured: list[list[Tensor]] = []
    hidden, weight = operands(hidden, weight)
    for rows, log_p in _chunks(hidden, weight):
        picked = targets[rows, None]
        p = log_p.exp()
        values = [-log_p.gather(-1, picked)[:, 0], -(p * log_p).sum(-1), p.square().sum(-1)]
        if direction is not None:
            slope = F.linear(hidden[rows], direction.to(hidden.dtype)).to(p.dtype)
            values.append((p * slope).sum(-1) - slope.gather(-1, picked)[:, 0])
        measured.append(values)
    loss, entropy, squares, *alignment = (torch.cat(values) for values in zip(*measured, strict=True))
    return TokenStatistics(loss, entropy, squares, alignment[0] if alignment else None)


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the matrix products: autocast does not affect products that write to a given tensor."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their log-probabilities, in fp32, or in fp64 for fp64 operands."""
    for rows in row_chunks(len(hidden), len(weight)):
        yield rows, F.linear(hidden[rows], weight).log_softmax(-1, dtype=accurate(hidden.dtype))


def row_chunks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Rows whose logits exist at a time."""
    size = max(CHUNK_LOGITS // n_columns, MIN_CHUNK_ROWS)
    for start in range(0, max(n_rows, 1), size):  # without rows, one empty chunk
        yield slice(start, min(start + size, n_rows))


def accurate(dtype: torch.dtype) -> torch.dtype:
    """Type in which losses of operands of type `dtype` are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
