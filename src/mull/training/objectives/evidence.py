"""What a weighting algorithm sees of a micro-batch, and what it returns.

Shapes: B batch, T tokens, D model width, V vocabulary, N valid targets. A score ``s [B, T]`` describes the target token:
``s[b, j]`` is about token ``j``, predicted from the tokens before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mull.model.causal_lm import MullForCausalLM
from mull.ops.cross_entropy import TokenStatistics, token_statistics
from mull.ops.targets import label_positions, valid_tokens
from mull.training.objectives.base import Batch, StepPlan, batch_states, layout


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an algorithm may look at: one micro-batch, the model's states on it, and what follows from them.

    Properties are computed at first access. Nothing here carries a gradient.
    """

    model: MullForCausalLM
    batch: Batch
    hidden: Tensor
    """Final-normed states ``[B, T, D]``, detached."""

    reference: MullForCausalLM | None = None
    """Frozen model to compare with, if the algorithm has one."""

    direction: Tensor | None = None
    """Gradient of the unembedding ``[V, D]`` with which `statistics` compares each target's own gradient."""

    reference_iterations: int | None = None
    """Think iterations of the reference; None is the number in its configuration."""

    temperature: float = 1.0
    """Divides the logits of the predictions that `statistics` and `reference_loss` describe."""

    @cached_property
    def positions(self) -> Tensor | None:
        """Position of each token in its document ``[B, T]``; None if every row is one document without padding."""
        return label_positions(**layout(self.batch))

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
        """Loss of each valid target under the reference model in nats ``[B, T]``, 0 elsewhere.

        Raises:
            ValueError: a token is outside the reference's vocabulary.
        """
        assert self.reference is not None, "the algorithm was made with a reference"
        known = self.reference.lm_head.out_features
        if known < self.model.lm_head.out_features and (token := int(self.batch["input_ids"].max())) >= known:
            raise ValueError(
                f"Token {token} is outside the reference model's vocabulary of {known} tokens: use a reference that is padded to "
                f"the model's {self.model.lm_head.out_features}."
            )
        with torch.no_grad():
            hidden = batch_states(self.reference, self.batch, self.reference_iterations)
        return self._statistics(self.reference, hidden).loss

    @cached_property
    def hidden_norm(self) -> Tensor:
        """Norm of the state that each valid target is predicted from ``[B, T]``, 0 elsewhere."""
        return self._at_targets(self.hidden[:, :-1][self.valid[:, 1:]].float().norm(dim=-1))

    def _statistics(self, model: MullForCausalLM, hidden: Tensor, direction: Tensor | None = None) -> TokenStatistics:
        rows = hidden[:, :-1][self.valid[:, 1:]] / self.temperature  # (N, D)
        measured = token_statistics(rows, model.unembedding(), self.batch["labels"][self.valid], direction)
        return TokenStatistics(*(None if values is None else self._at_targets(values) for values in measured))  # type: ignore[arg-type]

    def _at_targets(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.valid.shape).masked_scatter(self.valid, values)


def check_reference(model: MullForCausalLM, reference: MullForCausalLM, n_tokens: int | None = None) -> None:
    """Refuse a reference model with another vocabulary.

    Args:
        model: The model that is trained.
        reference: What it is compared with.
        n_tokens: As in `Resources`.

    Raises:
        ValueError: the sizes differ, and not both know `n_tokens`.
    """
    ours, theirs = model.lm_head.out_features, reference.lm_head.out_features
    if ours != theirs and (n_tokens is None or min(ours, theirs) < n_tokens):
        raise ValueError(
            f"The reference model has a vocabulary of {theirs} tokens, the model one of {ours}: their losses are about different "
            "tokens. Use a reference with the same tokenizer."
        )


@dataclass(kw_only=True)
class Scored:
    """Scores of a micro-batch, or of a whole step."""

    scores: Tensor
    """``[B, T]``, not negative unless the scorer is `Scorer.signed`; read at valid targets only."""

    clipped: Tensor | None = None
    """``[B, T]``: where the algorithm's limits changed a score."""

    seen: Tensor | None = None
    """Sums from which `Scorer.end_step` updates running statistics."""


class Scorer:
    """Scores targets by a function of the evidence, and keeps what an algorithm remembers between steps.

    Only `end_step` changes a scorer.

    Args:
        score: The algorithm.
        reference: Frozen model for `Evidence.reference_loss`.
        config: Settings of the algorithm, if it has any.
    """

    whole_step = False
    """Whether `settle` must see all targets of an optimizer step before the first of them can be weighted."""

    signed = False
    """Whether scores may be negative and are used as they are, not divided by their mean. Pushing an extra head away from a token
    lowers its loss without bound, and extra heads never sample, so nothing would correct them: they use positive scores only."""

    temperature = 1.0
    """Divides the main head's logits in the loss and in the evidence: the distribution that is trained."""

    companion: nn.Module | None = None
    """Module that is trained beside the model."""

    def __init__(
        self, score: Callable[[Evidence], Tensor | Scored], reference: MullForCausalLM | None = None, config: Any = None
    ) -> None:
        self.score = score
        self.reference = reference
        self.config = config

    @property
    def name(self) -> str:
        """Name of the function, or of the class if an algorithm has its own."""
        return getattr(self.score, "__name__", "") if type(self) is Scorer else type(self).__name__

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch], iterations: int, seed: int) -> StepPlan:
        """Decide what the scores of a step share; called without gradient, on every rank.

        An algorithm that learns from its own samples draws them here and returns them as the plan's batches. `seed` is that of
        the step, the same on every rank.
        """
        return StepPlan(batches=batches, iterations=iterations)

    def evidence(self, model: MullForCausalLM, batch: Batch, hidden: Tensor, plan: StepPlan) -> Evidence:
        """Collect what the algorithm looks at; `plan` is from `plan_step`."""
        return Evidence(model, batch, hidden.detach(), self.reference, temperature=self.temperature)

    @torch.no_grad()
    def __call__(self, evidence: Evidence) -> Scored:
        """Score a micro-batch."""
        scored = self.score(evidence)
        return scored if isinstance(scored, Scored) else Scored(scores=scored)

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Turn the scores of a whole step, ``[rows, T]`` of all micro-batches and ranks, into final ones."""
        return Scored(scores=scores)

    def auxiliary_loss(self, hidden: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        """Loss of the companion: its sum over targets times its coefficient, and the number of targets."""
        return None

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Update running statistics, on every rank.

        `seen` are the `Scored.seen` of this rank's micro-batches, and that of the whole step if `settle` returned one.

        Returns:
            Numbers to log.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the algorithm remembers between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
