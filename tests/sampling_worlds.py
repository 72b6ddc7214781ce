"""A target and a draft head of a tiny vocabulary, given as tables, whose distributions can be enumerated.

Texts of a length are in the order of `code`: a text is a number in base V, and a distribution of texts is a vector.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mull.ops.sampling import Sampling, warp

V = 5
N_LEVELS = 7
"""Texts of up to one token less have a next-token distribution."""

WARPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_k=1": {"top_k": 1},
    "top_k>=V": {"top_k": 1000},
    "top_p": {"top_p": 0.71},
    "top_p=1": {"top_p": 1.0},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p=0": {"min_p": 0.0},
    "min_p=1": {"min_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_reward": {"repetition_penalty": 0.6},
    "top_k+top_p": {"top_k": 4, "top_p": 0.81},
    "all": {"temperature": 0.8, "top_k": 4, "top_p": 0.947, "min_p": 0.1, "repetition_penalty": 1.3},
    "all, hot": {"temperature": 2.5, "top_k": 40, "top_p": 0.613, "min_p": 0.05, "repetition_penalty": 2.0},
}
"""No top_p here is a fraction of few equal tokens: there, which side of the edge is theirs would be a matter of rounding."""


def sampling_of(name: str) -> Sampling:
    return Sampling(**{"temperature": 1.0, **WARPERS[name]})


def code(tokens: Tensor) -> Tensor:
    """Each row as a number in base V."""
    return (tokens * V ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(-1)


def texts(length: int) -> Tensor:
    """All texts of a length, (V ** length, length)."""
    return torch.tensor(list(itertools.product(range(V), repeat=length)), dtype=torch.long).view(V**length, length)


def crossed(left: Tensor, right: Tensor) -> Tensor:
    """Every row of `left` continued by every row of `right`."""
    return torch.cat([left.repeat_interleave(len(right), 0), right.repeat(len(left), 1)], 1)


@dataclass(frozen=True, eq=False)
class World:
    """Logits of both after each text, ``table[length][code]``, and how they are sampled."""

    target: list[Tensor]
    head: list[Tensor]
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1))
    prompt: tuple[int, ...] = (1,)
    """Tokens seen before the text."""

    deterministic: bool = False
    """Drafts are the head's likeliest tokens instead of drawn ones."""

    @classmethod
    def random(cls, opposed: bool = False, **options: Any) -> "World":
        """A target, and a head that is a noisy copy of it, or one that prefers what the target avoids."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(V**level, V) for level in range(N_LEVELS)]
        target = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return cls(target, [-x if opposed else x + e for x, e in zip(target, noise, strict=True)], **options)

    @classmethod
    def constant(cls, p: list[float], q: list[float], **options: Any) -> "World":
        """The same two distributions after every text; a probability may be 0."""
        logits = (torch.tensor(each, dtype=torch.float64).log() for each in (p, q))
        target, head = ([each.expand(V**level, V) for level in range(N_LEVELS)] for each in logits)
        return cls(target, head, **options)

    def seen(self, text: Tensor) -> Tensor:
        """Tokens of the prompt and of each text, (rows, V)."""
        seen = F.one_hot(torch.cat([text, torch.tensor(self.prompt).expand(len(text), -1)], 1), V)
        return seen.sum(1) > 0

    def distribution(self, table: list[Tensor], text: Tensor) -> Tensor:
        """The warped distribution after each text, (rows, V)."""
        return warp(table[text.shape[1]][code(text)], self.sampling, self.seen(text))

    def target_distribution(self, text: Tensor) -> Tensor:
        """The distribution that the next token after each text must have, (rows, V)."""
        return self.distribution(self.target, text)

    def draft_distribution(self, text: Tensor) -> Tensor:
        """The distribution of a draft after each text, (rows, V)."""
        found = self.distribution(self.head, text)
        return F.one_hot(found.argmax(-1), V).double() if self.deterministic else found

    def joint(self, next_token: Callable[[Tensor], Tensor], text: Tensor, n_tokens: int) -> Tensor:
        """Probability of each continuation by `n_tokens` of each text, (rows, V ** n_tokens)."""
        joint = torch.ones(len(text), 1, dtype=torch.float64)
        for length in range(n_tokens):
            joint = (joint[..., None] * next_token(crossed(text, texts(length))).view(len(text), -1, V)).flatten(1)
        return joint
