"""First stage of critic-wmtp: train a value head on solutions of known outcome."""

from typing import TYPE_CHECKING

import torch

from mull.layers.value_head import ValueHead
from mull.training.objectives.base import Batch, LossOutput, Objective
from mull.training.objectives.weightings import Critic, CriticConfig

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM


class ValueTraining(Objective):
    """Squared error of a value head against lambda-returns; the model only provides states.

    The batch holds ``rewards [B, T]``, the outcome of the document that each token belongs to.

    Args:
        config: Discounts.
        value_head: Trained in place.
    """

    trains_model = False

    def __init__(self, config: CriticConfig, value_head: ValueHead) -> None:
        self.gamma, self.gae_lambda = config.gamma, config.gae_lambda
        self.companion = self._value_head = value_head
        self._critic = Critic(config, value_head)

    def __call__(self, model: "MullForCausalLM", batch: Batch) -> LossOutput:
        """Sum the squared error over the valid targets.

        Returns:
            The sum, the number of targets, and the metrics ``value``, ``outcome`` and ``mse``: means over the targets.

        Raises:
            ValueError: the batch has no rewards, or no target.
        """
        if "rewards" not in batch:
            raise ValueError(
                "A value head learns from outcomes, and this batch has no rewards: use data with correct and incorrect solutions."
            )
        with torch.no_grad():
            (hidden,) = model.early_decoded(
                batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                position_ids=batch.get("position_ids"),
            )
        evidence = self._critic.evidence(model, batch, hidden)
        total, count = self._critic.value_error(hidden, evidence)
        if count == 0:
            raise ValueError("No label of this batch is a target: drop such rows from the data.")
        with torch.no_grad():
            values = self._value_head(hidden)[:, :-1][evidence.valid[:, 1:]]
        outcome = batch["rewards"][evidence.valid]
        return LossOutput(
            total,
            count,
            {"value": float(values.mean()), "outcome": float(outcome.mean()), "mse": float(total.detach() / count)},
        )
