"""How many think iterations a training batch runs."""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mull.model.path import MAX_ITERATIONS
from mull.runtime.arguments import Frozen
from mull.runtime.distributed import rank, same_everywhere, world_size

SIGMA = 0.5
"""Sigma of the log-normal rate in Huginn's sampler."""


class IterationSampling(Frozen):
    """Fixed or sampled number of think iterations, and how many of them back-propagate.

    `sample` is called once per optimizer step, so all micro-batches of a step run equally deep.

    Source:
        ``poisson_lognormal`` is the sampler of Huginn (arXiv:2502.05171). Huginn does not bound the draw; we clamp it to
        `maximum`, because one long draw would decide the memory of the whole run.
    """

    kind: Literal["fixed", "uniform", "poisson_lognormal"] = "fixed"
    """``fixed`` always runs `maximum`; ``uniform`` draws from ``minimum..maximum``, both included; ``poisson_lognormal`` draws
    ``1 + Poisson(rate)`` with ``rate ~ LogNormal(ln(mean) - sigma²/2, sigma)``, sigma 0.5."""

    per: Literal["step", "token"] = "step"
    """``step`` draws one number for all tokens of an optimizer step; ``token`` one for each token, which stops then as in
    adaptive calls."""

    maximum: int = Field(ge=1, le=MAX_ITERATIONS)
    """Largest number of iterations."""

    minimum: int | None = Field(default=None, ge=1)
    """Smallest number of iterations of ``uniform``; 1 when not given."""

    mean: float | None = Field(default=None, gt=0, le=MAX_ITERATIONS)
    """Expected rate of ``poisson_lognormal``. Draws average ``mean + 1`` before they are clamped to `maximum`."""

    backprop_iterations: int | None = Field(default=None, ge=1)
    """Back-propagate through this many last iterations; the ones before run without gradient. ``None``: through all. A draw
    below this number back-propagates through all of its iterations."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum is not None and self.kind != "uniform":
            raise ValueError(
                f"minimum={self.minimum} is read by kind='uniform' only, but kind={self.kind!r}: leave it out."
            )
        if self.minimum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum={self.minimum} must not exceed maximum={self.maximum}.")
        if (self.mean is not None) != (self.kind == "poisson_lognormal"):
            raise ValueError(
                f"mean={self.mean} with kind={self.kind!r}: kind='poisson_lognormal' needs a mean, the other kinds take none."
            )
        if self.backprop_iterations is not None and self.backprop_iterations > self.maximum:
            raise ValueError(
                f"backprop_iterations={self.backprop_iterations} must lie in [1, maximum={self.maximum}]: gradients cannot flow "
                "through iterations that do not run."
            )
        if self.per == "token" and (self.kind == "fixed" or self.backprop_iterations is not None):
            raise ValueError(
                "per='token' draws iterations, and back-propagates through all of them: choose another kind than 'fixed', and "
                "leave backprop_iterations out."
            )
        return self

    def sample(self) -> int:
        """The number of a step: drawn from torch's global generator, or `maximum` where tokens draw their own."""
        return self.maximum if self.per == "token" else int(self._draw(()))

    def depths(self, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """The number of each token of this rank's micro-batches, which have shapes ``[B, T]``; None if a step draws one.

        A row's draws do not depend on its micro-batch or rank, if all micro-batches have equally many rows. Called on every rank.
        """
        if self.per == "step":
            return None
        seed = same_everywhere(int(torch.randint(2**31, ())))
        found = []
        for number, (n_rows, n_tokens) in enumerate(shapes):
            first = (rank() + number * world_size()) * n_rows
            generators = (torch.Generator().manual_seed(seed + first + row) for row in range(n_rows))
            found.append(torch.stack([self._draw([n_tokens], generator) for generator in generators]))
        return found

    def _draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        if self.kind == "fixed":
            return torch.full(shape, self.maximum)
        if self.kind == "uniform":
            return torch.randint(self.minimum or 1, self.maximum + 1, shape, generator=generator)
        assert self.mean is not None
        rate = torch.empty(shape).log_normal_(math.log(self.mean) - SIGMA**2 / 2, SIGMA, generator=generator)
        return (torch.poisson(rate, generator=generator).long() + 1).clamp(max=self.maximum)

    def backprop(self, iterations: int) -> int | None:
        """How many of `iterations` back-propagate; ``None`` for all."""
        return None if self.backprop_iterations is None else min(self.backprop_iterations, iterations)

    def average(self) -> float:
        """Mean number of iterations; of ``poisson_lognormal``, the mean of 1000 draws that leave the generator as it was."""
        if self.kind == "fixed":
            return self.maximum
        if self.kind == "uniform":
            return ((self.minimum or 1) + self.maximum) / 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            draws = [self.sample() for _ in range(1000)]
        return sum(draws) / len(draws)
