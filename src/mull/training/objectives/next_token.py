"""Next-token prediction: the loss of pre-training and fine-tuning.

Shapes: B batch, T tokens, D model width, N valid targets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.distributed import same_everywhere
from mull.training.objectives.base import Batch, LossOutput, Objective
from mull.training.objectives.iterations import IterationSampling

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM


class NextToken(Objective):
    """Cross-entropy of the last iteration's prediction, position ``t`` against the label at ``t + 1``, within documents.

    Only the rows of valid targets reach the unembedding.

    Args:
        iterations: Number of think iterations, and how many of them back-propagate.
    """

    def __init__(self, iterations: IterationSampling) -> None:
        self.iterations = iterations
        self._drawn: int | None = None

    def prepare(self, model: "MullForCausalLM", batches: Sequence[Batch]) -> Sequence[Batch]:
        """Draw the number of iterations, one for the whole step."""
        self._drawn = same_everywhere(self.iterations.sample())
        return batches

    def end_step(self) -> dict[str, float]:
        """Forget the number of iterations."""
        self._drawn = None
        return {}

    def __call__(self, model: "MullForCausalLM", batch: Batch) -> LossOutput:
        """Sum the cross-entropy over the valid targets. Outside a training step each call draws its own iterations.

        Returns:
            Loss in nats summed over the targets, their number, and the metrics ``loss`` (nats per target) and
            ``iterations``.

        Raises:
            ValueError: no label of the batch is a valid target.
        """
        positions = label_positions(batch.get("attention_mask"), batch.get("position_ids"))
        targets = targets_of(batch["labels"], positions, 1)[:, :-1, 0]
        valid = targets != IGNORED  # (B, T-1)
        n_targets = valid.sum()
        if n_targets == 0:
            raise ValueError(
                f"No label of this batch of shape {tuple(batch['labels'].shape)} is a target: all are {IGNORED} after the "
                "shift by one (the first token of a row or document has no prediction). Drop such rows from the data."
            )
        iterations = self.iterations.sample() if self._drawn is None else self._drawn
        hidden = model.early_decoded(
            batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            think_iterations=iterations,
            backprop_iterations=self.iterations.backprop(iterations),
        )[-1]
        rows = hidden[:, :-1][valid]  # (N, D)
        ones = torch.ones(len(rows), device=rows.device)
        total, _ = weighted_cross_entropy(rows, model.lm_head.weight, targets[valid], ones)
        return LossOutput(
            total, n_targets, {"loss": float(total.detach() / n_targets), "iterations": float(iterations)}
        )
