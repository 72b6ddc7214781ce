"""A small module whose training draws from every random generator, with all kinds of tensors that a checkpoint must have."""

import random

import numpy as np
import torch
from torch import Tensor, nn


class Noisy(nn.Module):
    """Tied, with a persistent and a passing buffer, one parameter that never gets a gradient, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        self.steps += 1
        noise = random.gauss(0, 1) + np.random.randn() + torch.randn(())
        return self.head(torch.dropout(self.hidden(self.embed(ids)), 0.5, train=True) * noise)


def optimizers_of(model: Noisy, **options: object) -> list[torch.optim.Optimizer]:
    rest = [p for p in model.parameters() if p is not model.hidden.weight]
    return [
        torch.optim.Muon([model.hidden.weight], lr=0.02),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, **{"fused": True, **options}),
    ]


def step(model: Noisy, optimizers: list[torch.optim.Optimizer]) -> float:
    loss = model(torch.arange(11)).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
