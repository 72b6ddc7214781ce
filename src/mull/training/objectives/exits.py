"""Exits: train the exit head, by whose probabilities tokens stop (the halting rule ``learned``).

After iteration j the head stops with probability ``λ_j = sigmoid(w · h_j + b)`` if it did not before; what is left stops after
the last one. So iteration j is a token's last with ``p_j = λ_j · (1 - λ_1) ··· (1 - λ_{j-1})``.

All tokens run all iterations here, and every one is decoded. In use, stopped tokens leave older keys to the others, see
`mull.model.configs.Stop`.

Shapes: B batch, T tokens, k iterations, N targets, D model width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mull.model.causal_lm import MullForCausalLM
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.distributed import same_everywhere
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan, layout, require_step_targets
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources, Settings


class ExitsConfig(Settings):
    """How the exit head is trained."""

    supervision: Literal["expected", "improvement"] = "expected"
    """``expected``: the mean loss over the exit distribution, with a penalty that keeps it near the prior; it reaches the whole
    model. ``improvement``: the head alone learns to stop after the first iteration whose loss is within `tolerance` of the
    token's best; the rest of the model gets no gradient."""

    prior: Literal["uniform", "geometric"] = "uniform"
    """Distribution over iterations that ``expected`` is drawn to."""

    stop_probability: float = Field(default=0.5, gt=0, lt=1)
    """Of the geometric prior, after each iteration."""

    prior_weight: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the prior, in nats."""

    tolerance: float = Field(default=0.02, ge=0)
    """Loss in nats that ``improvement`` gives away to stop earlier."""


class Exits(Objective):
    """Expected loss over the exit distribution plus its divergence from a prior, or exits taught by measured improvement.

    Args:
        iterations: Iterations of a step; at least 2 have to be possible.
        config: How.

    Raises:
        ValueError: `iterations` truncates back-propagation or draws per token.

    Source:
        Ouro (arXiv:2510.25741): expected loss with a uniform prior, and a second stage that learns from measured improvement.
        There, a stage-two label is a soft function of the improvement of the next step; here it is the first iteration that is
        good enough.
    """

    def __init__(self, iterations: IterationSampling, config: ExitsConfig) -> None:
        if iterations.per == "token" or iterations.backprop_iterations is not None or iterations.maximum < 2:
            raise ValueError(
                "exits weighs every iteration of every token: give loss.iterations a maximum of at least 2, without per='token' "
                "and backprop_iterations."
            )
        self.iterations = iterations
        self.config = config

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Draw the number of iterations.

        Raises:
            ValueError: no label of the step is a valid target.
        """
        require_step_targets(batches)
        return StepPlan(batches=batches, iterations=same_everywhere(max(2, self.iterations.sample())))

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the loss over the valid targets.

        Returns:
            The sum in nats, the number of targets, and the metrics ``loss`` (of the last iteration), ``expected_loss``,
            ``exit_iteration`` (mean of the exit distribution) and ``iterations``.
        """
        batch, iterations = plan.batches[index], plan.iterations
        targets = targets_of(batch["labels"], label_positions(**layout(batch)), 1)[:, :-1, 0]
        valid = targets != IGNORED
        frozen = self.config.supervision == "improvement"
        thoughts: list[Tensor] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = model.hidden_states_by_iteration(
                batch["input_ids"], **layout(batch), think_iterations=iterations, think_states=thoughts
            )
        head = model.model.exit_head
        assert head is not None, "checked when the objective was built"
        thought = torch.stack([state[:, :-1][valid] for state in thoughts[:-1]])  # (k - 1, N, D)
        stop = head(thought)[..., 0]
        stop = stop.to(torch.promote_types(stop.dtype, torch.float32))  # (k - 1, N), logits of λ
        log_p = exit_log_probabilities(stop)
        p = log_p.exp()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            found = [
                weighted_cross_entropy(state[:, :-1][valid], model.unembedding(), targets[valid], weight.detach())
                for state, weight in zip(states, p, strict=True)
            ]
        losses = torch.stack([of_target for _, of_target in found])  # (k, N), without gradient
        if frozen:
            total = _improvement(stop, losses, self.config.tolerance)
        else:
            weighted = torch.stack([total for total, _ in found]).sum()
            divergence = (p * (log_p - self._log_prior(log_p))).sum()
            # The sums above have the gradient of the losses; this has that of the probabilities, and the value 0.
            total = weighted + ((p - p.detach()) * losses).sum() + self.config.prior_weight * divergence
        n_targets = valid.sum()
        metrics = {"iterations": float(iterations)}
        if n_targets:
            numbers = torch.arange(1, iterations + 1, device=p.device)[:, None]
            metrics |= {
                "loss": float(losses[-1].mean()),
                "expected_loss": float((p.detach() * losses).sum(0).mean()),
                "exit_iteration": float((p.detach() * numbers).sum(0).mean()),
            }
        return LossOutput(total, n_targets, metrics)

    def _log_prior(self, log_p: Tensor) -> Tensor:
        n_iterations = len(log_p)
        if self.config.prior == "uniform":
            return torch.full_like(log_p, 1 / n_iterations).log()
        rate = log_p.new_full((n_iterations - 1, 1), self.config.stop_probability)
        return exit_log_probabilities(torch.logit(rate)).expand_as(log_p)


def exit_log_probabilities(stop: Tensor) -> Tensor:
    """``log p_j`` ``[k, N]`` from the logits of stopping after all iterations but the last, ``[k - 1, N]``."""
    goes_on = F.logsigmoid(-stop).cumsum(0)
    before = torch.cat([torch.zeros_like(goes_on[:1]), goes_on])
    return before + torch.cat([F.logsigmoid(stop), torch.zeros_like(goes_on[:1])])


def _improvement(stop: Tensor, losses: Tensor, tolerance: float) -> Tensor:
    """Summed over tokens: mean cross-entropy of the questions that a token is asked until it should stop."""
    good = losses <= losses.amin(0) + tolerance
    last = good.long().argmax(0)  # (N,): the first iteration that is good enough
    asked = torch.arange(len(stop), device=stop.device)[:, None] <= last
    stops = torch.arange(len(stop), device=stop.device)[:, None] == last
    each = F.binary_cross_entropy_with_logits(stop, stops.to(stop.dtype), reduction="none")
    return ((each * asked).sum(0) / asked.sum(0)).sum()


def exits(settings: ExitsConfig, resources: Resources) -> Exits:
    """Build the objective.

    Raises:
        ValueError: the model has no exit head.
    """
    if resources.model.model.exit_head is None:
        raise ValueError(
            "train.algo=exits trains the exit head, and the model has none: give model.etd the entry halting: {rule: learned}."
        )
    return Exits(resources.iterations, settings)
