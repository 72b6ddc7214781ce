"""Sampling from a known distribution, and speculative sampling that keeps it.

Shapes: B rows, K drafted tokens, N = K + 1 verified positions, V vocabulary.

A round verifies K drafts at once. Let ``p_j`` be the target's distribution at position j, and ``q_j`` the one that draft j was
drawn from:

    accept draft j  iff  u_j q_j(d_j) < p_j(d_j);   first rejected: draw from max(p_j - q_j, 0) / Σ;   none: draw from p_K

Every emitted token then has the target's distribution, whatever q is (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1 and
appendix A.1; Chen et al. 2023, arXiv:2302.01318, algorithm 2). This requires that q is the distribution that was really used,
warping included.

All randomness comes in as uniform numbers in [0, 1). Draw them in fp64: an fp32 number is a multiple of 2^-24, and a token rarer
than that would be drawn too often or never. Nothing here waits for the device or has a shape that depends on values, so
everything can be compiled as one graph and captured.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

MIN_TEMPERATURE = 1e-6
"""Below it, a logit divided by the temperature could leave the range of fp32."""

BELOW_ONE = 1 - 2.0**-53
"""The largest fp64 number below 1. Its product with x > 0 rounds to a number below x."""

MIN_MASS = torch.finfo(torch.float64).tiny
"""A residual with less mass than this is rounding error, and is not drawn from."""


class Sampling(BaseModel):
    """How a next token is chosen from logits.

    The steps and their order are those of ``transformers.GenerationMixin.generate``: repetition penalty, temperature, top-k,
    top-p, min-p. Unlike there, nothing is on by default, and top-k, top-p and min-p without a temperature are refused instead
    of ignored.
    """

    # Strict: True is no number.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, strict=True
    )

    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits. 0 is greedy decoding, 1 the model's own distribution; otherwise at least 1e-6."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep the k most probable tokens, and those that tie with the last of them. None keeps all."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of most probable tokens whose probability, among those that top-k kept, reaches this. Of tokens
    that tie at its edge, those with the smaller ids are kept; transformers leaves that to an unstable sort. None and 1 keep
    all."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens at least this fraction as probable as the most probable one (arXiv:2407.01082). None and 0 keep all."""

    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the positive logits of tokens that occurred before, prompt included, and multiplies the negative ones
    (arXiv:1909.05858); 1 is none. Applies to greedy decoding, too."""

    @model_validator(mode="after")
    def _temperature_has_a_meaning(self) -> "Sampling":
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too small to divide logits by: use 0 for greedy decoding, or at least "
                f"{MIN_TEMPERATURE}."
            )
        ignored = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and ignored:
            raise ValueError(
                f"{' and '.join(ignored)} would have no effect: temperature=0 is greedy decoding, which takes the most probable "
                f"token. Give a temperature (1 is the model's own distribution), or leave {' and '.join(ignored)} out."
            )
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken and nothing is random."""
        return self.temperature == 0

    @property
    def needs_seen(self) -> bool:
        """Whether the distribution depends on which tokens occurred before."""
        return self.repetition_penalty != 1


class Verdict(NamedTuple):
    """What a round emits: the first `n_accepted` drafts, then `next_token`."""

    n_accepted: Int[Tensor, " B"]
    """Accepted drafts of each row, 0 to K."""

    next_token: Int[Tensor, " B"]
    """The token after them: a correction if a draft was rejected, otherwise one more token."""


def penalize(
    logits: Float[Tensor, "*B V"], sampling: Sampling, seen: Bool[Tensor, "*B V"] | None = None
) -> Float[Tensor, "*B V"]:
    """Logits after the repetition penalty: those whose argmax greedy decoding takes.

    Args:
        logits: In any precision.
        sampling: Only `repetition_penalty` is read.
        seen: Tokens that occurred before; needed only if ``sampling.needs_seen``.

    Returns:
        The same tensor without a penalty; with one, fp32, or fp64 for fp64 logits.
    """
    if not sampling.needs_seen:
        return logits
    assert seen is not None, "a repetition penalty needs the tokens seen before"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(
    logits: Float[Tensor, "*B V"], sampling: Sampling, seen: Bool[Tensor, "*B V"] | None = None
) -> Float[Tensor, "*B V"]:
    """The distribution of the next token: softmax of the logits after transformers' processors.

    The distribution of a draft is this function of the head's logits, with the same `sampling`, and `seen` including earlier
    drafts.

    Args:
        logits: In any precision.
        sampling: Greedy sampling gives all probability to the most probable token.
        seen: Tokens that occurred before; needed only if ``sampling.needs_seen``.

    Returns:
        Probabilities in fp32, or fp64 for fp64 logits.
    """
    scores = penalize(logits, sampling, seen)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sampling.greedy:
        return _certain(scores, scores.argmax(-1))
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    top_k = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = _keep_top_p(scores, top_k, sampling.top_p)
    elif top_k < scores.shape[-1]:
        scores = _keep_top_k(scores, top_k)
    if sampling.min_p:
        scores = _keep_min_p(scores, sampling.min_p)
    return scores.softmax(-1)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """The k largest scores and what ties with the smallest of them; -inf elsewhere."""
    threshold = scores.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    return scores.masked_fill(scores < threshold, -torch.inf)


def _keep_top_p(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest set of largest scores with probability `top_p` among those that top-k keeps; -inf elsewhere.

    Only the k largest scores are sorted. Others may tie with the last of them: top-k keeps these, too, and they come next. Of
    scores that tie at the edge of the set, the first are kept.
    """
    everything = top_k == scores.shape[-1]
    top = scores.sort(descending=True).values if everything else scores.topk(top_k).values  # (..., k)
    last = top[..., -1:]
    n_tied = (scores == last).sum(-1, keepdim=True) - (top == last).sum(-1, keepdim=True)  # beyond the k

    weights = (top - top[..., :1]).exp()
    least = weights[..., -1:]
    tail = weights.flip(-1).cumsum(-1).flip(-1) + n_tied * least  # each token and all that are less likely
    limit = (1 - top_p) * tail[..., :1]  # a token is removed where its tail does not exceed this
    n_tied_kept = (n_tied - (limit / least).floor()).clamp(min=0).long()
    n_kept = (tail > limit).sum(-1, keepdim=True).clamp(min=1) + n_tied_kept

    edge = top.gather(-1, n_kept.clamp(max=top_k) - 1)
    at_edge = scores == edge
    n_at_edge = n_kept - (top > edge).sum(-1, keepdim=True)
    keep = (scores > edge) | (at_edge & (at_edge.cumsum(-1) <= n_at_edge))
    return scores.masked_fill(~keep, -torch.inf)


def _keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Scores with at least `min_p` of the largest probability; -inf elsewhere."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def draw(probabilities: Float[Tensor, "*B V"], uniform: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Draw one token per row by inverting the cumulative distribution, in fp64.

    Token i is drawn for ``c_{i-1} <= u Σp < c_i`` with the cumulative sums c. A token of probability 0 is never drawn.

    Args:
        probabilities: At least 0, and some above; they need not sum to 1.
        uniform: Random numbers in [0, 1), one per row, best in fp64; 1 is read as the largest number below it.
    """
    # Parallel prefix sums need not be monotone in the last digit, and could step up at a token of probability 0.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64).masked_fill(probabilities <= 0, 0.0)
    threshold = uniform.double().clamp(max=BELOW_ONE) * cumulative.amax(-1)
    return (cumulative > threshold[..., None]).to(torch.uint8).argmax(-1)  # the first of them


def accept(
    p: Float[Tensor, "B N V"],
    q: Float[Tensor, "B K V"] | None,
    drafts: Int[Tensor, "B K"],
    uniform: Float[Tensor, "B N"],
) -> Verdict:
    """Decide how many drafts to keep and draw the token after them, so that every token has the target's distribution.

    Args:
        p: The target's distributions, warped: row j after the tokens so far and the first j drafts.
        q: The distributions from which the drafts were drawn, warped the same way. None if the drafts were not drawn but chosen,
            such as by argmax: then q is 1 at the draft.
        drafts: Drafted tokens.
        uniform: Random numbers in [0, 1), best in fp64, independent of those that drew the drafts. The first K decide, the last
            one draws.

    Returns:
        The verdict. Its distribution is exact up to the rounding of p and q.

    Source:
        arXiv:2211.17192, algorithm 1. We accept on ``u q < p`` instead of ``u <= p / q``: no division, and a token with p = 0
        is not accepted at u = 0.
    """
    n_drafts = drafts.shape[1]
    p_drafted = p[:, :-1].gather(-1, drafts[..., None]).squeeze(-1).double()  # (B, K)
    u = uniform[:, :-1].double().clamp(max=BELOW_ONE)
    if q is not None:
        u = u * q.gather(-1, drafts[..., None]).squeeze(-1).double()
    n_accepted = _leading(u < p_drafted)

    distribution = _row(p, n_accepted).double()  # (B, V)
    rejected = (n_accepted < n_drafts)[:, None]
    if n_drafts > 0:
        first = n_accepted.clamp(max=n_drafts - 1)
        proposed = _row(q, first) if q is not None else _certain(distribution, _row(drafts, first))
        residual = (distribution - proposed).clamp(min=0)
        rejected = rejected & (residual.sum(-1, keepdim=True) > MIN_MASS)  # p = q: only rounding can reject
        distribution = torch.where(rejected, residual, distribution)
    return Verdict(n_accepted, draw(distribution, uniform[:, -1]))


def accept_greedy(logits: Float[Tensor, "B N V"], drafts: Int[Tensor, "B K"]) -> Verdict:
    """Keep drafts as long as each is the most probable token; then take the most probable token.

    Args:
        logits: The target's, penalized: row j after the tokens so far and the first j drafts.
        drafts: Drafted tokens.
    """
    best = logits.argmax(-1)  # (B, N)
    n_accepted = _leading(best[:, :-1] == drafts)
    return Verdict(n_accepted, _row(best, n_accepted))


def seen_along(seen: Bool[Tensor, "B V"], drafts: Int[Tensor, "B K"]) -> Bool[Tensor, "B K+1 V"]:
    """Tokens seen before each verified position: row j adds the first j drafts.

    Args:
        seen: Tokens of the text so far, the newest included.
        drafts: Drafted tokens.
    """
    rows = [seen]
    for token in drafts.unbind(1):
        rows.append(rows[-1].scatter(-1, token[:, None], True))
    return torch.stack(rows, dim=1)


def _certain(like: Float[Tensor, "*B V"], token: Int[Tensor, "*B"]) -> Float[Tensor, "*B V"]:
    """The distribution that is 1 at one token of each row, in the precision of `like`."""
    return torch.zeros_like(like).scatter(-1, token[..., None], 1.0)


def _leading(right: Bool[Tensor, "B K"]) -> Int[Tensor, " B"]:
    """How many entries are True before the first that is not."""
    return right.long().cumprod(-1).sum(-1)


def _row(values: Tensor, index: Int[Tensor, " B"]) -> Tensor:
    """``values[b, index[b]]`` for every b."""
    return values[torch.arange(values.shape[0], device=values.device), index]
