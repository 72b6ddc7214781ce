"""Weighting algorithms: what each token of a training text is worth.

An algorithm without settings or memory is a function of `Evidence`; `mull.training.objectives.table` has the names.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mull.layers.value_head import ValueHead, value_loss
from mull.model.causal_lm import MullForCausalLM
from mull.ops import token_weights
from mull.ops.cross_entropy import cross_entropy_gradients
from mull.runtime.distributed import global_sum
from mull.training.objectives.base import Batch, StepPlan, batch_states
from mull.training.objectives.evidence import Evidence, Scored, Scorer, check_reference
from mull.training.objectives.resources import Resources, Settings
from mull.training.objectives.weight_statistics import RunningMoments
from mull.training.optimization import MAX_LR


class Rho1Config(Settings):
    """Weights by excess loss over a reference model (Rho-1, arXiv:2404.07965).

    The excess is signed: a token that the reference finds harder than the model counts less, not more.
    """

    mode: Literal["weighted", "token_skip"] = "token_skip"
    """``weighted``: softmax of the excess over all targets of a step. ``token_skip``: drop the lowest share of them."""

    temperature: float = Field(default=1.0, gt=0)
    """Nats of excess that multiply a weight by e; read by ``weighted``."""

    skip_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of a step's targets that ``token_skip`` drops."""


class Rho1Section(Rho1Config):
    """Weights by excess loss over a reference model."""

    sources = frozenset({"reference"})

    reference: str
    """Directory or hub name of the reference model, which has the model's tokenizer."""


class ReturnConfig(Settings):
    """How the value of a token follows from the outcome of its document."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trade of bias against variance: 0 is the one-step TD error, 1 the outcome minus the value."""


class CriticConfig(ReturnConfig):
    """Weights by the advantage of a token under a value head: ``exp(A / β)``, whitened and clipped (arXiv:1910.00177)."""

    beta: float = Field(default=1.0, gt=0)
    """Standard deviations of advantage that multiply a weight by e."""

    min_weight: float = Field(default=0.1, ge=0)
    """Lower limit of a weight, before normalisation."""

    max_weight: float = Field(default=3.0, gt=0)
    """Upper limit of a weight, before normalisation."""

    momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest step in the running mean and deviation that whiten the advantages."""

    auxiliary_loss_coef: float = Field(default=0.1, ge=0)
    """Weight of the value head's squared error, which is added to the token loss. Its gradient reaches the trunk as well."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.min_weight >= self.max_weight:
            raise ValueError(f"min_weight={self.min_weight} must lie below max_weight={self.max_weight}.")
        return self


class PretrainSection(Settings):
    """Training of the value head before ``critic-wmtp``: it learns to tell right from wrong answers; the model stays as it is."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    peak_lr: float = Field(default=1e-3, gt=0, le=MAX_LR)
    """Learning rate of the value head after warm-up; everything else is as in ``train``."""

    per_problem: int | None = Field(default=None, ge=1)
    """Most pairs of a right and a wrong answer per problem; without it, all pairs."""

    corrupt: bool = False
    """For problems without a wrong answer, make one by changing one operator, constant or variable."""


class CriticSection(CriticConfig):
    """Weights by the advantage of a token under a value head."""

    sources = frozenset({"pretrain"})

    pretrain: PretrainSection | None = None
    """A stage before this one that trains the value head. Leave it out if another stage with ``value-head`` does."""


class GradientConfig(Settings):
    """Weights by a target's own gradient of the unembedding, which is an outer product and needs no backward pass."""

    mode: Literal["norm", "alignment"] = "norm"
    """``norm``: ``‖p - e_y‖ · ‖h‖``. ``alignment``: its inner product with the gradient on held-out text, negative ones 0."""

    momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest step in the running mean that divides the scores, and in the held-out gradient."""

    max_weight: float = Field(default=5.0, gt=0)
    """Upper limit of a weight, before normalisation."""


class GradientSection(GradientConfig):
    """Weights by a target's own gradient of the unembedding."""

    sources = frozenset({"paths"})

    paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """For ``alignment``: texts or tasks, as in ``data``, whose gradient targets are compared with. Do not give those of
    ``data.held_out_paths``, which would no longer be held out."""

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        if (self.mode == "alignment") != (self.paths is not None):
            raise ValueError(
                f"mode={self.mode} with paths={self.paths}: mode alignment needs paths, the other takes none"
            )
        return self


def baseline(evidence: Evidence) -> Tensor:
    """Every target counts the same."""
    return torch.ones(evidence.valid.shape, device=evidence.hidden.device)


def entropy(evidence: Evidence) -> Tensor:
    """Targets count more where the model is uncertain (EAFT, arXiv:2601.02151)."""
    return token_weights.entropy_weights(evidence.statistics.entropy, evidence.model.lm_head.out_features)


def dft(evidence: Evidence) -> Tensor:
    """Targets count less where the model finds them unlikely (dynamic fine-tuning, arXiv:2508.05629)."""
    return token_weights.dft_weights(evidence.statistics.loss)


class Rho1Weighted(Scorer):
    """``exp(excess / temperature)``; normalised, the softmax over the step."""

    def __init__(self, config: Rho1Config, reference: MullForCausalLM) -> None:
        def score(evidence: Evidence) -> Tensor:
            return token_weights.rho1_weights(evidence.statistics.loss, evidence.reference_loss, config.temperature)

        super().__init__(score, reference, config)


class Rho1TokenSkip(Scorer):
    """1 for the targets of highest excess loss in the step, 0 for the others."""

    whole_step = True

    def __init__(self, config: Rho1Config, reference: MullForCausalLM) -> None:
        super().__init__(lambda evidence: evidence.statistics.loss - evidence.reference_loss, reference, config)

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Rank all targets of the step against each other."""
        kept = token_weights.keep_highest(scores, valid, 1 - self.config.skip_share)
        return Scored(scores=kept.to(scores.dtype))


class _ScorerWithMoments(Scorer):
    """Keeps running moments of its scores."""

    def __init__(self, score: Callable[[Evidence], Tensor | Scored], config: CriticConfig | GradientConfig) -> None:
        super().__init__(score, config=config)
        self._moments = RunningMoments(config.momentum)

    def state_dict(self) -> dict[str, Any]:
        """Running moments of the scores."""
        return {"moments": self._moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._moments.load_state_dict(state["moments"])


class Critic(_ScorerWithMoments):
    """Weights by the advantage that a value head sees in each token.

    With the outcome of a document as the only reward, a token after which the outcome is likelier has a positive advantage.
    Documents without ``rewards`` in the batch count as right (outcome 1).

    Args:
        config: Discounts, limits, auxiliary loss.
        value_head: Estimates the outcome from a state of the trunk.
    """

    whole_step = True

    def __init__(self, config: CriticConfig, value_head: ValueHead) -> None:
        super().__init__(self._advantages, config)
        self.companion: ValueHead = value_head

    def _advantages(self, evidence: Evidence) -> Tensor:
        return _advantages_of(self.companion(evidence.hidden), evidence, self.config)

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Whiten with running moments, this step's included, and clip."""
        among = scores[valid].double()
        sums = torch.stack([among.sum(), among.square().sum(), valid.sum().double()])
        # A copy, because only `end_step` changes what is kept.
        moments = copy.copy(self._moments)
        if training or not moments.ready:
            moments.update(*sums.tolist())
        config = self.config
        weights, clipped = token_weights.advantage_weights(
            scores, moments.mean, moments.std, config.beta, config.min_weight, config.max_weight
        )
        return Scored(scores=weights, clipped=clipped, seen=sums)

    def auxiliary_loss(self, hidden: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        """Squared error of the values against lambda-returns."""
        if self.config.auxiliary_loss_coef == 0:
            return None
        total, count = value_error(self.companion, hidden, evidence, self.config)
        return self.config.auxiliary_loss_coef * total, count

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Update the running moments."""
        for sums in seen:
            self._moments.update(*sums.tolist())
        return {}


def value_error(
    value_head: ValueHead, hidden: Tensor, evidence: Evidence, config: ReturnConfig
) -> tuple[Tensor, Tensor]:
    """Squared error of the values against lambda-returns, summed over the valid targets, and the number of targets.

    The gradient reaches `hidden`.
    """
    values: Tensor = value_head(hidden)
    advantages = _advantages_of(values, evidence, config)
    returns = token_weights.lambda_returns(advantages, values.detach(), evidence.valid)
    return value_loss(values, returns, evidence.valid), evidence.valid.sum()


def _advantages_of(values: Tensor, evidence: Evidence, config: ReturnConfig) -> Tensor:
    rewards = evidence.batch.get("rewards")
    rewards = torch.ones_like(values) if rewards is None else rewards.to(values.dtype)
    return token_weights.advantages(
        values.detach(), rewards, evidence.valid, evidence.positions, config.gamma, config.gae_lambda
    )


class _GradientScores(_ScorerWithMoments):
    """A score of each target's own gradient, over its running mean.

    The running mean is that of the steps before; in the first step all targets count the same.
    """

    def __init__(self, config: GradientConfig, raw: Callable[[Evidence], Tensor]) -> None:
        super().__init__(self._relative, config)
        self._raw = raw

    def _relative(self, evidence: Evidence) -> Scored:
        raw = self._raw(evidence)
        among = raw[evidence.valid].double()
        seen = torch.stack([among.sum(), among.square().sum(), evidence.valid.sum().double()])
        if not self._moments.ready:
            return Scored(scores=torch.ones_like(raw), seen=seen)
        relative = raw / max(self._moments.mean, torch.finfo(raw.dtype).tiny)
        limit = self.config.max_weight
        return Scored(scores=relative.clamp(max=limit), clipped=relative > limit, seen=seen)

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Update the running mean by the step's scores."""
        self._moments.update(*global_sum(torch.stack(list(seen)).sum(0)).tolist())
        return {"gradient_score": self._moments.mean}


class GradientNorm(_GradientScores):
    """Norm of each target's gradient of the unembedding, over its running mean."""

    def __init__(self, config: GradientConfig) -> None:
        super().__init__(config, _norm)


def _norm(evidence: Evidence) -> Tensor:
    statistics = evidence.statistics
    return token_weights.gradient_norm(statistics.loss, statistics.sum_of_squares, evidence.hidden_norm)


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentPlan(StepPlan):
    """A step of `GradientAlignment`."""

    direction: Tensor
    """Held-out gradient of the unembedding ``[V, D]``, averaged over the steps so far."""


class GradientAlignment(_GradientScores):
    """How far a step on a target alone would lower the held-out loss, to first order and through the unembedding only.

    The inner product of a target's gradient with that of a held-out batch, the latter averaged over steps. Negative products
    count 0. Each step runs one held-out batch forward.

    Args:
        config: Limits and momentum.
        held_out: Pure function from the number of a batch to the batch; all ranks read the same ones.
        vocabulary: V and D, the shape of the unembedding.
    """

    def __init__(self, config: GradientConfig, held_out: Callable[[int], Batch], vocabulary: tuple[int, int]) -> None:
        super().__init__(config, _alignment)
        self._held_out = held_out
        self._direction = torch.zeros(vocabulary)
        self._step = 0

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch], iterations: int, seed: int) -> StepPlan:
        """Compute the held-out gradient to compare with; in evaluation mode, that of the last training step."""
        direction = self._direction.to(model.device)
        if model.training:
            gradient = self._gradient(model)
            newest = 1.0 if self._step == 0 else self.config.momentum
            direction = self._direction.to(gradient).lerp(gradient, newest)
        elif self._step == 0:
            direction = self._gradient(model)
        return AlignmentPlan(batches=batches, iterations=iterations, direction=direction)

    def _gradient(self, model: MullForCausalLM) -> Tensor:
        """Mean gradient of the unembedding on the next held-out batch ``[V, D]``."""
        batch = {name: tensor.to(model.device) for name, tensor in self._held_out(self._step).items()}
        with torch.no_grad():
            hidden = batch_states(model, batch)
            evidence = Evidence(model, batch, hidden)
            rows, targets = hidden[:, :-1][evidence.valid[:, 1:]], batch["labels"][evidence.valid]
            unembedding = model.unembedding()
            gradient = torch.zeros_like(unembedding, dtype=torch.float32)
            share = rows.new_full((len(rows),), 1 / max(len(rows), 1), dtype=torch.float32)
            cross_entropy_gradients(rows, unembedding, targets, share, gradient)
        return gradient

    def evidence(self, model: MullForCausalLM, batch: Batch, hidden: Tensor, plan: StepPlan) -> Evidence:
        """Add the held-out gradient."""
        assert isinstance(plan, AlignmentPlan)
        return Evidence(model, batch, hidden.detach(), direction=plan.direction)

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Keep the held-out gradient as well."""
        assert isinstance(plan, AlignmentPlan)
        self._direction = plan.direction
        self._step += 1
        return super().end_step(plan, seen)

    def state_dict(self) -> dict[str, Any]:
        """Running mean of the score, the held-out gradient, and the number of the next held-out batch."""
        return super().state_dict() | {"step": self._step, "direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(state)
        self._step, self._direction = state["step"], state["direction"]


def _alignment(evidence: Evidence) -> Tensor:
    alignment = evidence.statistics.alignment
    assert alignment is not None, "the evidence has a direction"
    return alignment.clamp(min=0)


def rho1(config: Rho1Config, resources: Resources) -> Scorer:
    """Build the scorer of ``rho1-wmtp``."""
    if resources.reference is None:
        raise ValueError("rho1-wmtp compares with a reference model, and none was given.")
    check_reference(resources.model, resources.reference, resources.n_tokens)
    kind = Rho1Weighted if config.mode == "weighted" else Rho1TokenSkip
    return kind(config, resources.reference)


def critic(config: CriticConfig, resources: Resources) -> Scorer:
    """Build the scorer of ``critic-wmtp``."""
    if resources.value_head is None:
        raise ValueError(
            "critic-wmtp reads a value head, and none was given: train one first, or let a recipe do both."
        )
    return Critic(config, resources.value_head)


def gradient(config: GradientConfig, resources: Resources) -> Scorer:
    """Build the scorer of ``gradient-wmtp``."""
    if config.mode == "norm":
        return GradientNorm(config)
    if resources.held_out is None:
        raise ValueError(
            "gradient-wmtp with mode alignment compares with the gradient on held-out text, and none was given."
        )
    head = resources.model.lm_head
    return GradientAlignment(config, resources.held_out, (head.out_features, head.in_features))
