"""What an objective is: a loss, planned once per optimizer step."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mull.model.causal_lm import MullForCausalLM
from mull.model.policy import Policy
from mull.ops.targets import IGNORED, label_positions, require_targets, valid_tokens
from mull.runtime.distributed import global_sum

Batch = Mapping[str, Tensor]
"""``input_ids [B, T]`` and ``labels [B, T]`` (unshifted, -100 ignored). Some tasks add ``position_ids [B, T]`` (a restart begins
a new document) and ``attention_mask`` (``[B, T]``, or ``[B, 1, T, T]`` boolean)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """What an objective decides about an optimizer step before the first loss of the step."""

    batches: Sequence[Batch]
    """This rank's micro-batches: those of the data, or those that the objective made from them."""

    iterations: int = 1
    """Think iterations of every micro-batch; the most, where its tokens have their own."""

    depths: Sequence[Tensor] | None = None
    """``[B, T]`` of every micro-batch: think iterations of its tokens; None if all run `iterations`."""

    def depths_of(self, index: int) -> Tensor | None:
        """Those of one micro-batch."""
        return None if self.depths is None else self.depths[index]


class LossOutput(NamedTuple):
    """What one micro-batch contributes to an optimizer step."""

    sum: Tensor
    """Weighted loss summed over the targets, a differentiable scalar. The loop divides by the step's total weight."""

    weight: Tensor
    """Total weight of the targets, a scalar without gradient."""

    metrics: dict[str, float]
    """Numbers to log, averaged over the micro-batches of a step that have them: leave out what a batch without targets lacks."""

    seen: Any = None
    """What `Objective.end_step` needs to know about this micro-batch."""


class Objective(ABC):
    """A loss ``(sum, weight, metrics)``, and what it decides once per optimizer step.

    A step is `plan_step`, `loss` for each micro-batch, `end_step`. Only `end_step` changes the objective. With several ranks,
    each rank sees its own micro-batches; a decision about all of them must be equal on every rank (`mull.runtime.distributed`
    has the sums and broadcasts).

    Public attributes are settings: a run resumes only if they equal those in its checkpoint.
    """

    companion: nn.Module | None = None
    """Module that is trained and saved beside the model, such as a value head."""

    trains: Sequence[str] | None = None
    """Patterns of names of the model's parameters that the loss reaches; the others are frozen. Empty trains the companion
    alone. None trains what `mull.training.loop.TrainConfig.trainable` says."""

    @property
    def reference(self) -> MullForCausalLM | None:
        """Frozen model that the loss runs beside the trained one, whole on every rank."""
        return None

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Decide what the micro-batches of a step share, without gradient. Called on every rank.

        `batches` are this rank's micro-batches, on the model's device.
        """
        return StepPlan(batches=batches)

    @abstractmethod
    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Compute the loss of ``plan.batches[index]``.

        Randomness comes from torch's global generator, which a resumed run restores.
        """

    def end_step(self, plan: StepPlan, seen: Sequence[Any]) -> dict[str, float]:
        """Update running statistics. Called on every rank after the last micro-batch and before the optimizer step.

        `seen` are the `LossOutput.seen` of this rank's micro-batches.

        Returns:
            Numbers to log about the whole step, equal on every rank.
        """
        return {}

    def __call__(self, model: MullForCausalLM, batch: Batch) -> LossOutput:
        """Compute the loss of one micro-batch outside a training step. The objective stays as it is."""
        return self.loss(model, self.plan_step(model, [batch]), 0)

    def state_dict(self) -> dict[str, Any]:
        """What the objective remembers between steps, for resuming: tensors and JSON values by name.

        Tensors must exist from the start with their final shape, because checkpoints are loaded in place.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""


def layout(batch: Batch) -> dict[str, Any]:
    """Padding and documents of a micro-batch, as the model and `mull.ops.targets.label_positions` take them."""
    return {name: batch.get(name) for name in ("attention_mask", "position_ids")}


def require_step_targets(batches: Sequence[Batch]) -> None:
    """Refuse a step in which no micro-batch of any rank has a target. Called on every rank.

    Raises:
        ValueError: there is no target.
    """
    counts = [valid_tokens(batch["labels"], label_positions(**layout(batch))).sum() for batch in batches]
    require_targets(global_sum(torch.stack(counts).sum()), batches[0]["labels"])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout; afterwards each of its modules has its mode back, also one that another model shares."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batch_states(
    model: MullForCausalLM,
    batch: Batch,
    iterations: int | None = None,
    backprop_iterations: int | None = None,
    depths: Tensor | None = None,
    policy: Policy | None = None,
) -> Tensor:
    """Final-normed states of a micro-batch, ``[B, T, D]``.

    `iterations` None is the model's own number; `depths` ``[B, T]`` are those of each token, up to `iterations`, unless a
    `policy` decides about them.
    """
    return model.hidden_states(
        batch["input_ids"],
        **layout(batch),
        prompt_mask=_prompt(batch),
        think_iterations=iterations,
        backprop_iterations=backprop_iterations,
        policy=policy or _given(model, depths),
    )


def batch_states_by_iteration(
    model: MullForCausalLM, batch: Batch, iterations: int, depths: Tensor | None = None
) -> Sequence[Tensor]:
    """States as in `batch_states`, decoded after each of the iterations."""
    return model.hidden_states_by_iteration(
        batch["input_ids"],
        **layout(batch),
        prompt_mask=_prompt(batch),
        think_iterations=iterations,
        policy=_given(model, depths),
    )


def _prompt(batch: Batch) -> Tensor | None:
    """What routers of sequences may look at, see `MullModel.with_routing`."""
    return batch["labels"] == IGNORED if "labels" in batch else None


def _given(model: MullForCausalLM, depths: Tensor | None) -> Policy | None:
    return None if depths is None else model.model.given_depths(depths.to(model.device))


def mixed_seed(*numbers: int) -> int:
    """A seed that changes when any of the numbers does."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big")
