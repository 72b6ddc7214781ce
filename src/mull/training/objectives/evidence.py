"""What a weighting algorithm sees of a micro-batch, and what it returns.

Shapes: B batch, T tokens, D model width, V vocabulary, N valid targets. A score ``s [B, T]`` describes the target token:
``s[b, j]`` is about token ``j``, predicted from the tokens before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mull.ops.cross_entropy import TokenStatistics, token_statistics
from mull.ops.targets import label_positions, valid_tokens
from mull.training.objectives.base import Batch

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an algorithm may look at: one micro-batch, the model's states on it, and what follows from them.

    What is computed from the predictions is computed when it is first asked for. Nothing here carries a gradient.
    """

    model: "MullForCausalLM"
    batch: Batch
    hidden: Tensor
    """Final-normed states ``[B, T, D]``, detached."""

    reference: "MullForCausalLM | None" = None
    """Frozen model to compare with, where the algorithm has one."""

    direction: Tensor | None = None
    """Gradient of the unembedding ``[V, D]`` that `statistics` aligns each target's own with."""

    reference_iterations: int | None = None
    """Think iterations of the reference; None is its own number."""

    temperature: float = 1.0
    """Divides the logits of the predictions that `statistics` and `reference_loss` describe."""

    @cached_property
    def positions(self) -> Tensor | None:
        """Position of each token in its document ``[B, T]``; None where every row is one document without padding."""
        return label_positions(self.batch.get("attention_mask"), self.batch.get("position_ids"))

    @cached_property
    def valid(self) -> Tensor:
        """``[B, T]``: True where a token is a target of the next-token head."""
        return valid_tokens(self.batch["labels"], self.positions)

    @cached_property
    def statistics(self) -> TokenStatistics:
        """The model's prediction of each valid target, each field ``[B, T]``, 0 elsewhere."""
        return self._statistics(self.model, self.hidden, self.direction)

    @cached_property
    def reference_loss(self) -> Tensor:
        """Loss of each valid target under the reference model in nats ``[B, T]``, 0 elsewhere."""
        assert self.reference is not None, "the algorithm was made with a reference"
        with torch.no_grad():
            (hidden,) = self.reference.early_decoded(
                self.batch["input_ids"],
                attention_mask=self.batch.get("attention_mask"),
                position_ids=self.batch.get("position_ids"),
                think_iterations=self.reference_iterations,
            )
        return self._statistics(self.reference, hidden).loss

    @cached_property
    def hidden_norm(self) -> Tensor:
        """Norm of the state that each valid target is predicted from ``[B, T]``, 0 elsewhere."""
        return self._at_targets(self.hidden[:, :-1][self.valid[:, 1:]].float().norm(dim=-1))

    def _statistics(self, model: "MullForCausalLM", hidden: Tensor, direction: Tensor | None = None) -> TokenStatistics:
        rows = hidden[:, :-1][self.valid[:, 1:]] / self.temperature  # (N, D)
        measured = token_statistics(rows, model.lm_head.weight, self.batch["labels"][self.valid], direction)
        return TokenStatistics(*(None if values is None else self._at_targets(values) for values in measured))  # type: ignore[arg-type]

    def _at_targets(self, values: Tensor) -> Tensor:
        return torch.zeros(self.valid.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.valid, values
        )


def check_reference(model: "MullForCausalLM", reference: "MullForCausalLM") -> None:
    """Refuse a reference model of another vocabulary.

    Raises:
        ValueError: names both sizes.
    """
    ours, theirs = model.lm_head.out_features, reference.lm_head.out_features
    if ours != theirs:
        raise ValueError(
            f"The reference model has a vocabulary of {theirs} tokens, the model one of {ours}: their losses are about different "
            "tokens. Use a reference with the same tokenizer."
        )


@dataclass
class Scored:
    """Scores of a micro-batch, from `Scorer.__call__`."""

    scores: Tensor
    """``[B, T]``, not negative unless the scorer is `Scorer.signed`; read at valid targets only."""

    clipped: Tensor | None = None
    """``[B, T]``: where the algorithm's limits changed a score."""


class Scorer:
    """Scores targets by a function of the evidence, and keeps what an algorithm remembers.

    Args:
        score: The algorithm.
        reference: Frozen model for `Evidence.reference_loss`.
    """

    whole_step = False
    """Whether `settle` must see all targets of an optimizer step before the first of them can be weighed."""

    signed = False
    """Whether scores may be negative and stand for themselves. They are then not divided by their mean, and heads behind the main
    one take the positive ones only: the cross-entropy of a head that is pushed away from a token has no lower bound, and unlike
    the main one it drew no sample that could show the harm."""

    temperature = 1.0
    """Divides the main head's logits in the loss and in the evidence: the law that is trained."""

    companion: nn.Module | None = None
    """Module that is trained beside the model."""

    config: Any = None
    """Settings of the algorithm, where it has some."""

    def __init__(
        self, score: Callable[[Evidence], Tensor | Scored], reference: "MullForCausalLM | None" = None
    ) -> None:
        self.score = score
        self.reference = reference

    @property
    def name(self) -> str:
        """Name of the function, or of the class of an algorithm that has its own."""
        return getattr(self.score, "__name__", "") if type(self) is Scorer else type(self).__name__

    def rollout(
        self, model: "MullForCausalLM", batches: Sequence[Batch], iterations: int, seeds: Sequence[int]
    ) -> Sequence[Batch]:
        """The micro-batches to train on, given those of the data: an algorithm that learns from its own samples draws them here.

        Args:
            model: The model that is trained.
            batches: This rank's micro-batches of the step.
            iterations: Think iterations of the step.
            seeds: A seed per micro-batch, which depends on its place in the step and not on the rank.
        """
        return batches

    def begin_step(self, model: "MullForCausalLM") -> None:
        """Renew what the scores of a step refer to."""

    def evidence(self, model: "MullForCausalLM", batch: Batch, hidden: Tensor) -> Evidence:
        """Collect what the algorithm looks at."""
        return Evidence(model, batch, hidden.detach(), self.reference, temperature=self.temperature)

    @torch.no_grad()
    def __call__(self, evidence: Evidence) -> Scored:
        """Score a micro-batch."""
        scored = self.score(evidence)
        return scored if isinstance(scored, Scored) else Scored(scored)

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Turn the scores of a whole step, ``[rows, T]`` of all micro-batches and ranks, into final ones."""
        return Scored(scores)

    def auxiliary_loss(self, hidden: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        """Loss of the companion: its sum over targets with its coefficient, and the number of targets."""
        return None

    def end_step(self) -> dict[str, float]:
        """Note what the step has shown, on all ranks alike."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the algorithm remembers between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
