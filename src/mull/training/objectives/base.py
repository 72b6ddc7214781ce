"""What a training stage is: a loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM

Batch = Mapping[str, Tensor]
"""``input_ids [B, T]`` and ``labels [B, T]`` (unshifted, -100 ignored); where a task has them ``position_ids [B, T]`` (a restart
begins a new document) and ``attention_mask`` (``[B, T]``, or ``[B, 1, T, T]`` boolean)."""


class LossOutput(NamedTuple):
    """What one micro-batch contributes to an optimizer step."""

    sum: Tensor
    """Weighted loss summed over the targets, a differentiable scalar. The loop divides by the step's total weight."""

    weight: Tensor
    """Total weight of the targets, a scalar without gradient."""

    metrics: dict[str, float]
    """Numbers to log, averaged over the micro-batches of a step."""


class Objective(ABC):
    """A training stage: ``loss(model, batch) -> (sum, weight, metrics)``.

    A step is `prepare`, one call per micro-batch, `end_step`. With several ranks each sees its own micro-batches of the step;
    what an objective decides for all of them, it decides equally on every rank (`mull.runtime.distributed` has the sums and
    broadcasts).
    """

    companion: nn.Module | None = None
    """Module that is trained and saved beside the model, such as a value head."""

    trains_model = True
    """Whether the loss reaches the model's weights. Otherwise the companion alone is trained, and no optimizer state is kept for
    the model."""

    def prepare(self, model: "MullForCausalLM", batches: Sequence[Batch]) -> Sequence[Batch]:
        """See all micro-batches of a step before the first loss, without gradient.

        Here is the place to draw what they share and to compute what depends on all of them.

        Args:
            model: The model that is trained.
            batches: This rank's micro-batches, on the model's device.

        Returns:
            The batches to call the objective with, where it needs them with further entries.
        """
        return batches

    @abstractmethod
    def __call__(self, model: "MullForCausalLM", batch: Batch) -> LossOutput:
        """Compute the loss of one micro-batch. Randomness comes from torch's global generator, which resuming restores."""

    def end_step(self) -> dict[str, float]:
        """Note what the step has shown, on all ranks alike; called behind its last micro-batch, before the weights change.

        Returns:
            Numbers to log, of the whole step and equal on every rank.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the objective remembers between steps and a resumed run needs: tensors and JSON values, by name.

        A tensor is there from the start, with its final shape: checkpoints are loaded in place.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
