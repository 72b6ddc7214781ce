"""LoRA experts: several low-rank updates of one linear map, of which each token takes one, and the gate that chooses.

Shapes: N tokens, E experts, R rank, I inputs, O outputs, D model width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mull.layers.routers import Router, normed


@dataclass(frozen=True)
class Assignment:
    """Tokens in the order of their experts."""

    order: Int[Tensor, " N"]
    """Which token comes at each place."""

    places: Int[Tensor, " N"]
    """The place of each token."""

    sizes: list[int]
    """Tokens of each expert."""

    @classmethod
    def of(cls, expert: Int[Tensor, " N"], n_experts: int) -> "Assignment":
        """The order of tokens that chose these experts."""
        order = expert.argsort(stable=True)
        return cls(order, order.argsort(), expert.bincount(minlength=n_experts).tolist())


class Gates:
    """How much each expert counts for each token; all but one count 0.

    Args:
        weights: ``[..., E]``.
    """

    def __init__(self, weights: Float[Tensor, "... E"]) -> None:
        self.weights: Float[Tensor, "N E"] = weights.flatten(0, -2)
        self.chosen = self.weights.sum(-1, keepdim=True)
        """``[N, 1]``: the weight of the one that counts."""
        # Sizes cannot be read while a graph is traced.
        self.assignment = (
            None
            if torch.compiler.is_compiling()
            else Assignment.of(self.weights.detach().argmax(-1), weights.shape[-1])
        )


class LoRABranches(nn.Module):
    """The experts of one linear map: ``scale · B_e (A_e x)`` for a token's expert e. B starts at zero.

    Each expert runs on its own tokens alone, so a token costs one branch however many there are. In a traced graph, all branches
    run and all but one are multiplied by 0.

    Args:
        n_inputs: I.
        n_outputs: O.
        n_experts: E.
        rank: R.
        scale: LoRA's ``alpha / rank``.
        dropout: Probability with which training drops an input of A.

    Source:
        LoRA (arXiv:2106.09685); MoDr (ICLR 2026) puts one such update per branch on its recurrent block.
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, n_experts: int, *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(n_experts, rank, n_inputs))
        self.lora_B = nn.Parameter(torch.empty(n_experts, n_outputs, rank))
        self.scale, self.dropout = scale, dropout
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Make every branch give zero. A starts as PEFT starts it."""
        bound = self.lora_A.shape[-1] ** -0.5
        init.uniform_(self.lora_A, -bound, bound)
        init.zeros_(self.lora_B)

    def forward(self, x: Float[Tensor, "... I"], gates: Gates) -> Float[Tensor, "... O"]:
        """What the tokens' experts add to the map's output."""
        flat = F.dropout(x.flatten(0, -2), self.dropout, self.training)
        added = self._every(flat, gates) if gates.assignment is None else self._own(flat, gates, gates.assignment)
        return added.view(*x.shape[:-1], added.shape[-1])

    def _own(self, x: Float[Tensor, "N I"], gates: Gates, to: Assignment) -> Float[Tensor, "N O"]:
        single = len(x) in to.sizes  # one expert has all tokens, as in decoding of a single row
        parts = [
            F.linear(F.linear(part, a), b)
            for part, a, b in zip(
                (x if single else x[to.order]).split(to.sizes), self.lora_A.unbind(), self.lora_B.unbind(), strict=True
            )
            if len(part)
        ]
        added = parts[0] if single else torch.cat(parts)[to.places]
        return added * (self.scale * gates.chosen).to(added.dtype)

    def _every(self, x: Float[Tensor, "N I"], gates: Gates) -> Float[Tensor, "N O"]:
        n_experts, rank, _ = self.lora_A.shape
        inner = F.linear(x, self.lora_A.flatten(0, 1)).view(-1, n_experts, rank)
        inner = inner * (self.scale * gates.weights).to(inner.dtype)[..., None]
        return F.linear(inner.flatten(1), self.lora_B.transpose(0, 1).flatten(1))


class ExpertGate(Router):
    """``W norm(h)``: a logit per expert.

    Args:
        width: Model width D.
        n_experts: E.

    Source:
        MoDr (ICLR 2026), whose gate reads the mean over all tokens, later ones included, of the state and the encoder's output.
    """

    def __init__(self, width: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        self.start_at_random()

    def start_at_random(self) -> None:
        """Logits of about unit variance: were they all alike, the bias would move every token from expert to expert at once."""
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """Logits of the experts."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(normed(states.to(self.precision)), self.weight.to(self.precision))
