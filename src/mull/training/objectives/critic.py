"""Train a value head on solutions of known outcome, before ``critic-wmtp`` weighs tokens with it."""

from collections.abc import Sequence

import torch
from pydantic import Field

from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan, batch_states, require_step_targets
from mull.training.objectives.evidence import Evidence
from mull.training.objectives.resources import Resources
from mull.training.objectives.weightings import ReturnConfig, value_error


class ValueSection(ReturnConfig):
    """Training of a value head, which learns to tell right from wrong answers; the model stays as it is."""

    sources = frozenset({"per_problem", "corrupt"})

    per_problem: int | None = Field(default=None, ge=1)
    """Most pairs of a right and a wrong answer per problem; without it, all pairs."""

    corrupt: bool = False
    """For problems without a wrong answer, make one by changing one operator, constant or variable."""


class ValueTraining(Objective):
    """Squared error of a value head against lambda-returns; the model only provides states.

    Batches have ``rewards [B, T]``, the outcome of the document that each token belongs to.

    Args:
        config: Discounts.
        value_head: Trained in place.
    """

    trains = ()

    def __init__(self, config: ReturnConfig, value_head: ValueHead) -> None:
        self.gamma, self.gae_lambda = config.gamma, config.gae_lambda
        self.companion = self._value_head = value_head
        self._config = config

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Nothing to decide.

        Raises:
            ValueError: no label of the step is a valid target.
        """
        require_step_targets(batches)
        return super().plan_step(model, batches)

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the squared error over the valid targets.

        Returns:
            The sum, the number of targets, and the metrics ``value``, ``outcome`` and ``mse``: means over the targets, if there
            are any.

        Raises:
            ValueError: the batch has no rewards.
        """
        batch = plan.batches[index]
        if "rewards" not in batch:
            raise ValueError(
                "A value head learns from outcomes, and this batch has no rewards: use data with correct and incorrect solutions."
            )
        with torch.no_grad():
            hidden = batch_states(model, batch)
        evidence = Evidence(model, batch, hidden)
        total, count = value_error(self._value_head, hidden, evidence, self._config)
        if count == 0:
            return LossOutput(total, count, {})
        with torch.no_grad():
            values = self._value_head(hidden)[:, :-1][evidence.valid[:, 1:]]
        outcome = batch["rewards"][evidence.valid]
        means = {"value": float(values.mean()), "outcome": float(outcome.mean()), "mse": float(total.detach() / count)}
        return LossOutput(total, count, means)


def value_training(config: ReturnConfig, resources: Resources) -> ValueTraining:
    """Build the objective ``value-head``."""
    if resources.value_head is None:
        raise ValueError("value-head trains a value head, and none was given.")
    return ValueTraining(config, resources.value_head)
