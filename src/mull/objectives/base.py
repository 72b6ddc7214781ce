"""What a training stage is: a loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from mull.model import MullForCausalLM

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
    """A training stage: ``loss(model, batch) -> (sum, weight, metrics)``."""

    def begin_step(self) -> None:
        """Draw what all micro-batches of an optimizer step share. The loop calls it before the first of them."""

    @abstractmethod
    def __call__(self, model: "MullForCausalLM", batch: Batch) -> LossOutput:
        """Compute the loss of one micro-batch. Randomness comes from torch's global generator, which resuming restores."""

    def state_dict(self) -> dict[str, Any]:
        """What the objective remembers between steps and a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
