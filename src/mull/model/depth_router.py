"""Token-choice recursion: a router gives each token its iterations when the token enters the think block.

Shapes: B batch, T tokens, N tokens that think, D model width, k most iterations of the model.
"""

import torch
from torch import Tensor

from mull.layers.routers import DepthGate
from mull.model.balance import BalancedChoice
from mull.model.path import MAX_ITERATIONS


class DepthRouter(BalancedChoice):
    """Chooses among 1 to k iterations by a linear map of a token's own state. The gradient of the choice is straight through.

    Args:
        width: Model width D.
        n_depths: k.
        rate: Step of the bias that keeps the numbers of tokens of all depths equal.

    Source:
        Mixture-of-Recursions (arXiv:2507.10524), token choice. There, what the block computes is multiplied by the probability of
        the chosen depth. Here it is not, so a token of full depth computes what the looped model does. Only the gradient counts
        an iteration's update with the probability that it runs. By that of the chosen depth alone, a token that stopped too early
        would learn to stop there: more of its update would have helped.
    """

    def __init__(self, width: int, n_depths: int, rate: float) -> None:
        super().__init__(n_depths, rate)
        self.gate = DepthGate(width, n_depths)

    @torch.no_grad()
    def choose(self, states: Tensor, training: bool) -> Tensor:
        """The iterations ``[N]`` of tokens that enter the block with `states` ``[N, D]``.

        The deepest choice has no end but that of the call: a call with more than k iterations runs all of them.
        """
        chosen = (self.gate(states).softmax(-1) + self.bias).argmax(-1)
        self.count(chosen, training)
        return torch.where(chosen == len(self.bias) - 1, MAX_ITERATIONS, chosen + 1)

    def going_on(self, logits: Tensor, iteration: int, at_least: int, at_most: int) -> Tensor:
        """How probably tokens run an iteration, ``[B, T]``.

        Args:
            logits: ``[B, T, k]``.
            iteration: Its number, from 1.
            at_least: Fewest iterations of the call, where the router chooses fewer.
            at_most: Its most; also what the deepest choice runs.
        """
        leads_to = torch.arange(1, 1 + logits.shape[-1], device=logits.device).clamp(at_least, at_most)
        leads_to[-1] = at_most
        return (logits.softmax(-1) * (leads_to >= iteration)).sum(-1)
