"""What a step's weights look like, running moments of scores, and control weights that know nothing of the tokens."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mull.ops.token_weights import constant
from mull.runtime.distributed import gather, global_sum

Weights = Float[Tensor, "*N H"]
"""Of targets and heads."""

Mask = Bool[Tensor, "*N H"]


class RunningMoments:
    """Mean and standard deviation over the recent steps, each target of which counts ``1 - momentum`` times one of the next.

    What decays are the sums and the count, so that a step of few targets counts little, one of none changes nothing, and the
    first step needs no correction for starting at zero.

    Args:
        momentum: Share of the newest step once many have been seen, in ``(0, 1]``; 0.1 looks back about ten steps.

    Raises:
        ValueError: `momentum` lies outside ``(0, 1]``.
    """

    def __init__(self, momentum: float) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in (0, 1].")
        self.momentum = momentum
        self._sum = self._sum_of_squares = self._count = 0.0

    @property
    def ready(self) -> bool:
        """Whether a target has been seen; only then is there a mean."""
        return self._count > 0

    @property
    def mean(self) -> float:
        """Running mean."""
        return self._sum / self._count

    @property
    def std(self) -> float:
        """Running standard deviation, of the population; it includes how far the mean itself moved."""
        return math.sqrt(max(self._sum_of_squares / self._count - self.mean**2, 0.0))

    def update(self, total: float, sum_of_squares: float, count: float) -> None:
        """Take in a step: sums over the targets of all micro-batches and ranks, added up in fp64."""
        keep = 1 - self.momentum
        self._sum = keep * self._sum + self.momentum * total
        self._sum_of_squares = keep * self._sum_of_squares + self.momentum * sum_of_squares
        self._count = keep * self._count + self.momentum * count

    def state_dict(self) -> dict[str, float]:
        """The decayed sums and count."""
        return {"sum": self._sum, "sum_of_squares": self._sum_of_squares, "count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict`."""
        self._sum, self._sum_of_squares, self._count = state["sum"], state["sum_of_squares"], state["count"]


def shuffle(weights: Weights, valid: Mask, generator: torch.Generator) -> Weights:
    """Control: the same weights at random targets.

    Each head's weights are permuted among all its valid targets in the tensor, so that every statistic of a head stays what it
    was and only the choice of tokens is lost. Heads are permuted independently.

    Args:
        weights: Weights to permute.
        valid: True at the targets.
        generator: Source of the permutation, on any device.

    Returns:
        The permuted weights, 0 where `valid` is False.
    """
    flat, targets = weights.detach().flatten(0, -2), valid.flatten(0, -2)
    keys = torch.rand(flat.shape, generator=generator, device=generator.device, dtype=torch.float64).to(flat.device)
    # Both orders list a head's targets before its other entries: one as they stand, one at random.
    places = targets.to(torch.uint8).argsort(dim=0, descending=True, stable=True)
    sources = torch.where(targets, keys, 2.0).argsort(dim=0, stable=True)
    shuffled = torch.zeros_like(flat).scatter(0, places, flat.gather(0, sources))
    return torch.where(targets, shuffled, 0).view(weights.shape)


def matched_random(weights: Weights, valid: Mask, generator: torch.Generator) -> Weights:
    """Control: log-normal weights that know nothing of the tokens.

    Per head, the mean over its valid targets is exactly that of `weights`. The standard deviation is that of the distribution
    drawn from, so a sample's differs by its sampling error. Not matched: the share of zeros, clipping, the shape of the tails.

    Args:
        weights: Weights to imitate, not negative.
        valid: True at the targets.
        generator: Source of the draws, on any device.

    Returns:
        Random weights, 0 where `valid` is False.

    Raises:
        ValueError: a valid weight is negative, which no log-normal number is.
    """
    targets = valid.flatten(0, -2)
    flat = torch.where(targets, constant(weights).flatten(0, -2), 0).double()
    if (flat < 0).any():
        raise ValueError("Signed weights have no log-normal counterpart: use the shuffled control with them.")
    count = targets.sum(0).clamp(min=1)
    total = flat.sum(0)
    mean = total / count
    variance = torch.where(targets, flat - mean, 0).square().sum(0) / count
    sigma = torch.log1p(variance / torch.where(mean > 0, mean, 1).square()).sqrt()
    normal = torch.randn(flat.shape, generator=generator, device=generator.device, dtype=torch.float64).to(flat.device)
    draws = torch.where(targets, (sigma * normal - sigma.square() / 2).exp(), 0)
    draws = draws * (total / draws.sum(0).clamp(min=torch.finfo(torch.float64).tiny))
    return draws.to(constant(weights).dtype).view(weights.shape)


@dataclass(frozen=True, slots=True, eq=False)
class WeightStatistics:
    """What a set of weights looks like, as sums that add over micro-batches and ranks.

    Signed weights enter by their absolute value.
    """

    sums: Tensor
    """``[6, H]`` fp64 over each head's valid targets: their number, ``Σ|w|``, ``Σ w²``, ``Σ |w| ln |w|``, clipped ones, zeros."""

    largest: Tensor
    """``[H]`` fp64: largest ``|w|``."""

    @classmethod
    def measure(cls, weights: Weights, valid: Mask, clipped: Mask | None = None) -> "WeightStatistics":
        """Measure the weights of one micro-batch.

        Args:
            weights: Weights before they are normalised.
            valid: True at the targets.
            clipped: True where a weight was clipped.
        """
        targets = valid.flatten(0, -2)
        size = torch.where(targets, weights.detach().flatten(0, -2), 0).double().abs()
        marked = torch.zeros_like(targets) if clipped is None else clipped.flatten(0, -2) & targets
        terms = [targets, size, size.square(), torch.xlogy(size, size), marked, targets & (size == 0)]
        return cls(torch.stack([term.sum(0, dtype=torch.float64) for term in terms]), size.amax(0))

    def __add__(self, other: "WeightStatistics") -> "WeightStatistics":
        return WeightStatistics(self.sums + other.sums, torch.maximum(self.largest, other.largest))

    def over_ranks(self) -> "WeightStatistics":
        """Of all ranks' weights; collective."""
        return WeightStatistics(global_sum(self.sums), torch.stack(gather(self.largest)).amax(0))

    def report(self) -> dict[str, float]:
        """Numbers to log: ``weights/<name>`` over all heads, ``weights/head<h>/<name>`` of each head that has targets.

        * ``ess``: effective sample size as a share of the targets, ``(Σ|w|)² / (n Σ w²)``; 1 if all are equal.
        * ``entropy``: of ``|w| / Σ|w|``, over ``ln n``; 1 if all are equal.
        * ``mean``: ``Σ|w| / n``, what normalising to mean 1 divides by.
        * ``max``: largest weight after dividing by the mean over all heads.
        * ``clip_rate``, ``zero_rate``: shares of the targets.

        Of weights that are all 0, `ess`, `entropy` and `max` are 0.
        """
        overall = self.sums.sum(1)
        mean = float(overall[1] / overall[0].clamp(min=1))
        groups = {"weights": _describe(overall.tolist(), float(self.largest.max()), mean)}
        for head, (sums, largest) in enumerate(zip(self.sums.T.tolist(), self.largest.tolist(), strict=True)):
            groups[f"weights/head{head}"] = _describe(sums, largest, mean)
        return {f"{group}/{name}": number for group, numbers in groups.items() for name, number in numbers.items()}


def _describe(sums: list[float], largest: float, overall_mean: float) -> dict[str, float]:
    count, total, squares, total_ln, clipped, zeros = sums
    if count == 0:
        return {}
    entropy = 0.0
    if total > 0:
        entropy = (math.log(total) - total_ln / total) / math.log(count) if count > 1 else 1.0
    ess = total**2 / (count * squares) if total > 0 else 0.0
    scaled = largest / overall_mean if overall_mean > 0 else 0.0
    shares = {"clip_rate": clipped / count, "zero_rate": zeros / count}
    return {"ess": ess, "entropy": entropy, "mean": total / count, "max": scaled, **shares}
