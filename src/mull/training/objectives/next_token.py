"""Next-token prediction: the loss of pre-training and fine-tuning.

Shapes: B batch, T tokens, D model width, N valid targets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mull.model.causal_lm import MullForCausalLM
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.distributed import same_everywhere
from mull.training.objectives.base import (
    Batch,
    LossOutput,
    Objective,
    StepPlan,
    batch_states,
    layout,
    require_step_targets,
)
from mull.training.objectives.iterations import IterationSampling


class NextToken(Objective):
    """Cross-entropy of the last iteration's prediction: position ``t`` against the label at ``t + 1``, within documents.

    Only the rows of valid targets reach the unembedding.

    Args:
        iterations: Number of think iterations, and how many of them back-propagate.
    """

    def __init__(self, iterations: IterationSampling) -> None:
        self.iterations = iterations

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Draw the iterations.

        Raises:
            ValueError: no label of the step is a valid target.
        """
        require_step_targets(batches)
        iterations = same_everywhere(self.iterations.sample())
        depths = self.iterations.depths([batch["input_ids"].shape for batch in batches])
        return StepPlan(batches=batches, iterations=iterations, depths=depths)

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the cross-entropy over the valid targets.

        Returns:
            Loss in nats summed over the targets, their number, and the metrics ``loss`` (nats per target) and
            ``iterations``; a batch without targets has no ``loss``.
        """
        batch, iterations = plan.batches[index], plan.iterations
        hidden = batch_states(model, batch, iterations, self.iterations.backprop(iterations), plan.depths_of(index))
        return self.loss_of(model, batch, hidden, iterations)

    def loss_of(self, model: MullForCausalLM, batch: Batch, hidden: Tensor, iterations: int) -> LossOutput:
        """That of a micro-batch with these final-normed states ``[B, T, D]``."""
        targets = targets_of(batch["labels"], label_positions(**layout(batch)), 1)[:, :-1, 0]
        valid = targets != IGNORED  # (B, T-1)
        n_targets = valid.sum()
        rows = hidden[:, :-1][valid]  # (N, D)
        ones = torch.ones(len(rows), device=rows.device)
        total, _ = weighted_cross_entropy(rows, model.unembedding(), targets[valid], ones)
        metrics = {"iterations": float(iterations)}
        if n_targets:
            metrics["loss"] = float(total.detach() / n_targets)
        return LossOutput(total, n_targets, metrics)
