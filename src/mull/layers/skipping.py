"""What token skipping looks at to choose the tokens that run a layer.

Shapes: B batch, T tokens, D model width, N tokens of any number; R rows, A queries, K keys and H heads of an attention.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mull.layers.routers import Router, normed

SCORE_STD = 0.02
"""Of a new score's weights, as of the linear maps of most pretrained models."""


class TokenScore(Router):
    """``w · norm(h)``: how much a token needs a layer, compared with the others of its row.

    Args:
        width: Model width D.

    Source:
        Mixture-of-Depths (arXiv:2404.02258), whose score is ``w · h``. States of deep layers have few very large components,
        which would decide alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.start()

    def start(self) -> None:
        """Small random weights."""
        init.normal_(self.weight, std=SCORE_STD)

    def forward(self, states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
        """Scores."""
        with torch.autocast(states.device.type, enabled=False):
            return normed(states.to(self.precision)) @ self.weight.to(self.precision)


class ResidualGate(Router):
    """``2 · sigmoid(W norm(h) + b)``: by how much each component of a layer's update counts. New gates are 1 exactly.

    Args:
        width: Model width D.

    Source:
        GateSkip (arXiv:2510.13876), whose gate ``sigmoid(W h + b)`` starts nearly open, by a large b. There the slope is nearly
        0, and the model is not quite the pretrained one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)
        self.start()

    def start(self) -> None:
        """Let every update pass as it is."""
        init.zeros_(self.map.weight)
        init.zeros_(self.map.bias)

    def forward(self, states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Gates between 0 and 2."""
        dtype = self.precision
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(normed(states.to(dtype)), self.map.weight.to(dtype), self.map.bias.to(dtype))
            return 2 * logits.sigmoid()


def highest(
    scores: Float[Tensor, "B T"], sequences: Int[Tensor, "B T"], counted: Bool[Tensor, "B T"], share: float
) -> Bool[Tensor, "B T"]:
    """The tokens with the highest scores of their sequence: this share of the counted ones, rounded up.

    Of equal scores the earlier ones count as higher.

    Args:
        scores: What tokens are ranked by.
        sequences: Number of each token's sequence.
        counted: False for padding, which is never chosen.
        share: From 0 to 1.
    """
    flat = scores.flatten().masked_fill(~counted.flatten(), -torch.inf)
    number = sequences.flatten()
    order = flat.argsort(descending=True, stable=True)
    order = order[number[order].argsort(stable=True)]  # by sequence, and in it by score
    lengths = number.bincount()
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[number[order]]
    n_counted = torch.zeros_like(lengths).index_add(0, number, counted.flatten().long())
    n_chosen = (share * n_counted.double() - 1e-9).ceil()  # 0.1 * 30 is above 3
    return (rank < n_chosen[number]).view_as(counted) & counted


def quantile(scores: Float[Tensor, " N"], share: float) -> Float[Tensor, ""]:
    """The highest threshold that at least this share of the scores reaches."""
    n_below = int((1 - share) * len(scores) + 1e-9)
    return scores.kthvalue(1 + min(n_below, len(scores) - 1)).values


def attention_to_itself(
    weights: Float[Tensor, "R H A K"], visible: Bool[Tensor, "... A K"] | None
) -> Float[Tensor, "R A"]:
    """The attention that each token pays to itself, as a multiple of an even share among the keys that it sees.

    Args:
        weights: Of the heads, whose mean counts. A token's own key is the last one that it sees.
        visible: ``[R or 1, 1, A, K]``; None if all keys are.
    """
    mean = weights.mean(1, dtype=torch.promote_types(weights.dtype, torch.float32))
    seen = torch.ones_like(mean, dtype=torch.bool) if visible is None else visible[:, 0].expand_as(mean)
    own = (seen * torch.arange(mean.shape[-1], device=mean.device)).argmax(-1, keepdim=True)
    return mean.gather(-1, own)[..., 0] * seen.sum(-1)


def attention_received(weights: Float[Tensor, "R H A K"], queries: Bool[Tensor, "R A"]) -> Float[Tensor, "R K"]:
    """The attention that each key receives from these queries, averaged over the heads."""
    mean = weights.mean(1, dtype=torch.promote_types(weights.dtype, torch.float32))
    return (mean * queries[..., None]).sum(1)
