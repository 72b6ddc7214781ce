"""Divergence of a student's predictions from a teacher's, in bounded memory.

As in `mull.ops.cross_entropy`, rows are projected in chunks, and the gradient is computed while a chunk's logits exist. So the
logits of all rows are kept for neither model.

Shapes: N rows, D and E widths of student and teacher, V and W their vocabularies, K kept tokens.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mull.ops.cross_entropy import accurate, add_product, operands, row_chunks

Kind = Literal["forward", "reverse", "jsd"]
"""``forward``: ``KL(p ‖ q)`` of teacher p and student q. ``reverse``: ``KL(q ‖ p)``. ``jsd``: with ``m = βp + (1-β)q``,
``β KL(p ‖ m) + (1-β) KL(q ‖ m)`` (GKD, arXiv:2306.13649)."""


class Predictor(NamedTuple):
    """A teacher's predictions as what they are computed from. It may live on another device than the student."""

    hidden: Float[Tensor, "N E"]
    """Final-normed hidden states."""

    weight: Float[Tensor, "W E"]
    """Unembedding matrix."""


class TopK(NamedTuple):
    """A teacher's predictions as its most probable tokens and one bucket for all others, at the temperature of the record."""

    tokens: Int[Tensor, "N K"]
    """The K most probable tokens, most probable first."""

    log_p: Float[Tensor, "N K+1"]
    """Their log-probabilities, then that of the bucket."""


def divergence(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher: Predictor | TopK,
    *,
    kind: Kind = "forward",
    temperature: float = 1.0,
    mixture: float = 0.5,
    n_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """``T² Σ_n D(p_n, q_n)`` of predictions at temperature T, and each row's term.

    The factor T² keeps the size of the gradient: at small logits, that of the divergence itself falls with ``1 / T²``.
    A `TopK` merges the tokens of its bucket for both models, which never raises the divergence.

    Args:
        hidden: The student's final-normed hidden states.
        weight: The student's unembedding matrix.
        teacher: The teacher's predictions of the same rows. No gradient flows into it.
        temperature: Divides the logits of both; of a `TopK`, that of its record.
        mixture: β of ``jsd``: share of the teacher.
        n_tokens: The first tokens of both vocabularies, which are compared; columns after them are padding. None compares all.

    Returns:
        The sum, differentiable once with respect to `hidden` and `weight`, and one detached term per row, in nats; both fp32, or
        fp64 for fp64 operands. Equal logits give exactly 0, and a gradient of exactly 0.
    """
    size = min(n_tokens or len(weight), len(weight))
    total, terms = _Divergence.apply(hidden, weight, teacher, kind, temperature, mixture, size, torch.is_grad_enabled())
    return total, terms


class _Divergence(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Predictor | TopK,
        kind: Kind,
        temperature: float,
        mixture: float,
        n_tokens: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        terms = torch.empty(len(hidden), dtype=accurate(hidden.dtype), device=hidden.device)
        wanted = differentiable and any(ctx.needs_input_grad)
        rows, matrix = operands(hidden, weight)
        matrix = matrix[:n_tokens]
        hidden_gradient = torch.empty_like(rows) if wanted else None
        weight_gradient = None
        if wanted and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=accurate(weight.dtype))
        # The gradient of the logits has the factor T² of the loss and 1/T of the division.
        scaled = rows * temperature
        for chunk in row_chunks(len(rows), n_tokens):
            log_q = _log_softmax(rows[chunk], matrix, temperature)
            if isinstance(teacher, TopK):
                part = TopK(teacher.tokens[chunk].to(hidden.device), teacher.log_p[chunk].to(hidden.device))
                terms[chunk], error = _in_buckets(part, log_q, kind, mixture)
            else:
                log_p = _teacher_chunk(teacher, chunk, temperature, n_tokens).to(hidden.device)
                terms[chunk], error = _compare(log_p, log_q, kind, mixture)
            if hidden_gradient is None:
                continue
            error = error.to(matrix.dtype)
            torch.mm(error, matrix, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                add_product(weight_gradient[:n_tokens], error.T, scaled[chunk])
        terms.mul_(temperature**2)
        if hidden_gradient is not None:
            own = None if weight_gradient is None else weight_gradient.to(weight.dtype)
            ctx.save_for_backward(hidden_gradient.mul_(temperature).to(hidden.dtype), own)
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _terms: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient * upstream.to(hidden_gradient.dtype),
            None if weight_gradient is None else weight_gradient * upstream.to(weight_gradient.dtype),
            *(None,) * 6,
        )


def _log_softmax(rows: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = F.linear(rows, weight)
    exact = logits.to(accurate(logits.dtype))
    return (exact if temperature == 1 else exact / temperature).log_softmax(-1)


def _teacher_chunk(teacher: Predictor, chunk: slice, temperature: float, n_tokens: int) -> Tensor:
    rows, matrix = operands(teacher.hidden[chunk], teacher.weight[:n_tokens])
    return _log_softmax(rows, matrix, temperature)


def _compare(log_p: Tensor, log_q: Tensor, kind: Kind, mixture: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row, and its gradient with respect to the logits of `log_q`. Both arguments are overwritten."""
    if kind == "forward":
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p).sum(-1)
        return terms, log_q.exp_().sub_(p)
    difference, q = log_p.sub_(log_q), log_q.exp()
    if kind == "reverse":
        terms = -(difference * q).sum(-1)
        return terms, difference.neg_().sub_(terms[:, None]).mul_(q)
    # With d = ln p - ln q, ln(q/m) = -ln(1 + β(eᵈ - 1)), and likewise for p/m. Of the two, the one whose exponent is negative is
    # computed: it cannot overflow, and d = 0 gives exactly 0.
    share = torch.full_like(difference, mixture).masked_fill_(difference > 0, 1 - mixture)
    base = difference.abs().neg_().expm1_().mul_(share).log1p_().neg_()
    p_over_m = base + difference.clamp(max=0)
    q_over_m = base.sub_(difference.clamp(min=0))
    of_student = (q * q_over_m).sum(-1)
    # p = q eᵈ would overflow.
    of_teacher = p_over_m.mul_(log_q.add_(difference).exp_()).sum(-1)
    terms = mixture * of_teacher + (1 - mixture) * of_student
    return terms, q_over_m.sub_(of_student[:, None]).mul_(q).mul_(1 - mixture)


def _in_buckets(teacher: TopK, log_q: Tensor, kind: Kind, mixture: float) -> tuple[Tensor, Tensor]:
    """As `_compare`, of the kept tokens and the bucket."""
    kept = log_q.gather(-1, teacher.tokens.long())
    rest = log_q.scatter_(-1, teacher.tokens.long(), -torch.inf)
    log_tail = rest.logsumexp(-1, keepdim=True)
    log_p = teacher.log_p.to(log_q.dtype, copy=True)  # the record stays as it is
    terms, slope = _compare(log_p, torch.cat([kept, log_tail], -1), kind, mixture)
    # The bucket's slope reaches its tokens in proportion to their probabilities.
    error = rest.sub_(log_tail).exp_().mul_(slope[:, -1:])
    return terms, error.scatter_(-1, teacher.tokens.long(), slope[:, :-1])


@torch.no_grad()
def top_k(teacher: Predictor, k: int, *, temperature: float = 1.0, n_tokens: int | None = None) -> TopK:
    """Record a teacher's predictions for `divergence`, without keeping their logits.

    Args:
        k: Tokens to keep; fewer than are compared.
        temperature: Of the recorded predictions.
        n_tokens: As in `divergence`.

    Returns:
        ``[N, K]`` int32, and ``[N, K + 1]`` fp32, or fp64 for fp64 operands.

    Raises:
        ValueError: `k` leaves nothing for the bucket.
    """
    size = min(n_tokens or len(teacher.weight), len(teacher.weight))
    if not 1 <= k < size:
        raise ValueError(f"top_k={k} must be at least 1 and less than the {size} tokens that are compared.")
    n_rows, device, dtype = len(teacher.hidden), teacher.hidden.device, accurate(teacher.hidden.dtype)
    tokens = torch.empty(n_rows, k, dtype=torch.int32, device=device)
    log_p = torch.empty(n_rows, k + 1, dtype=dtype, device=device)
    for chunk in row_chunks(n_rows, size):
        whole = _teacher_chunk(teacher, chunk, temperature, size)
        log_p[chunk, :k], picked = whole.topk(k, -1)
        tokens[chunk] = picked
        # Not 1 - Σp, which loses its digits where the bucket is small.
        log_p[chunk, k] = whole.scatter_(-1, picked, -torch.inf).logsumexp(-1)
    return TopK(tokens, log_p)
