"""Step supervision: each iteration is taught one step of a known procedure.

Shapes: B batch, T tokens, K steps with a label, k iterations run, N positions with a label, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mull.model.causal_lm import MullForCausalLM
from mull.ops.targets import IGNORED
from mull.runtime.distributed import global_sum, same_everywhere
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan, batch_states_by_iteration
from mull.training.objectives.iterations import IterationSampling

EMA_DECAY = 0.9
"""Decay of the running first-step accuracy: a window of about ten optimizer steps."""


class StepSupervision(Objective):
    """Cross-entropy of every iteration's early-decoded output against the label of its step.

    A curriculum starts with one iteration. Batches run more only once the first step is mastered, because a later step cannot
    be learnt on top of a wrong first one. The phase is the objective's state and advances once per optimizer step.

    Batches have ``step_labels [B, T, K]``: entry ``[b, t, j]`` is the target of iteration ``j + 1`` *at* position ``t`` (not
    shifted), -100 to ignore.

    Args:
        iterations: Iterations of the second phase, e.g. ``IterationSampling(kind="uniform", minimum=2, maximum=5)``.
        threshold: Running accuracy of the first step that ends the first phase.
        stop_unlabelled: Tokens without a label at any step stop after the first iteration, as in adaptive calls. In use they have
            to stop there, too.

    Raises:
        ValueError: `iterations` truncates back-propagation, or `threshold` lies outside ``(0, 1)``.
    """

    def __init__(self, iterations: IterationSampling, threshold: float = 0.93, stop_unlabelled: bool = False) -> None:
        if iterations.backprop_iterations is not None:
            raise ValueError(
                f"backprop_iterations={iterations.backprop_iterations} would cut off losses, because step supervision has one "
                "at every iteration: leave it out."
            )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is an accuracy and must lie between 0 and 1.")
        self.iterations = iterations
        self.threshold = threshold
        self.stop_unlabelled = stop_unlabelled
        self._first_step_accuracy = 0.0
        self._mastered = False

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Draw the number of iterations; it is 1 in the first phase.

        Raises:
            ValueError: a batch labels fewer steps than `iterations` may run, or the step has no first step with a label.
        """
        self._check_labels([batch["step_labels"] for batch in batches])
        return StepPlan(batches=batches, iterations=same_everywhere(self.iterations.sample() if self._mastered else 1))

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the cross-entropy over positions and iterations.

        Returns:
            Loss in nats summed over the targets, their number, and the metrics ``loss`` (nats per target), ``iterations``,
            ``first_step_accuracy`` and ``last_step_accuracy`` (share of this batch's targets; the last step is that of the
            last iteration run). A batch without targets has ``iterations`` alone.
        """
        batch, iterations = plan.batches[index], plan.iterations
        step_labels = batch["step_labels"]
        depths = torch.where((step_labels != IGNORED).any(-1), iterations, 1)
        states = batch_states_by_iteration(model, batch, iterations, depths if self.stop_unlabelled else None)
        labelled = (step_labels[..., :iterations] != IGNORED).any(-1)  # (B, T)
        targets = step_labels[labelled][:, :iterations].T  # (k, N)
        logits = model.lm_head(torch.stack([state[labelled] for state in states])).float()  # (k, N, V)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        weight = (targets != IGNORED).sum()
        first, last = (_hits_and_targets(logits[step], targets[step]) for step in (0, -1))
        metrics = {"iterations": float(iterations)}
        if weight:
            metrics |= {"loss": float(total.detach() / weight)}
            metrics |= {"first_step_accuracy": _accuracy(first), "last_step_accuracy": _accuracy(last)}
        return LossOutput(total, weight, metrics, first)

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Advance the curriculum by the first-step accuracy over all targets of the step, logged as ``first_step_accuracy``."""
        hits, targets = global_sum(torch.stack(list(seen)).sum(0)).tolist()
        accuracy = hits / targets
        self._first_step_accuracy = EMA_DECAY * self._first_step_accuracy + (1 - EMA_DECAY) * accuracy
        self._mastered = self._mastered or self._first_step_accuracy > self.threshold
        return {"first_step_accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Running accuracy of the first step, and whether the first phase is over."""
        return {"first_step_accuracy": self._first_step_accuracy, "mastered": self._mastered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._first_step_accuracy = state["first_step_accuracy"]
        self._mastered = state["mastered"]

    def _check_labels(self, step_labels: Sequence[Tensor]) -> None:
        n_steps = min(labels.shape[-1] for labels in step_labels)
        if n_steps < self.iterations.maximum:
            raise ValueError(
                f"step_labels label {n_steps} steps, but up to {self.iterations.maximum} iterations may run and each "
                f"needs a label: label more steps, or set maximum={n_steps}."
            )
        counts = torch.stack([(labels[..., 0] != IGNORED).sum() for labels in step_labels])
        if global_sum(counts.sum()) == 0:
            raise ValueError(
                f"No first iteration of this step has a label, in batches of shape {tuple(step_labels[0].shape)}: all are "
                f"{IGNORED}. Drop such batches when building the data."
            )


def _hits_and_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """How many valid targets the largest logit hits, and how many there are, ``[2]``."""
    valid = targets != IGNORED
    hits = (logits.argmax(-1) == targets) & valid
    return torch.stack([hits.sum(), valid.sum()])


def _accuracy(counts: Tensor) -> float:
    """Share of the targets that were hit; 0 where there is none."""
    hits, targets = counts.tolist()
    return float(hits / max(targets, 1))
