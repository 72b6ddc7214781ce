"""Weighting algorithms: what each token of a training text is worth.

A new algorithm is one function of `Evidence` and one row of `FUNCTIONS`; another package adds one by an entry point of the group
``mull.objectives`` whose name is the algorithm's and whose value is such a function.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mull.layers.value_head import ValueHead, value_loss
from mull.ops.cross_entropy import cross_entropy_gradients
from mull.ops.token_weights import (
    advantage_weights,
    advantages,
    dft_weights,
    entropy_weights,
    gradient_norm,
    keep_highest,
    lambda_returns,
    rho1_weights,
)
from mull.runtime.distributed import global_sum
from mull.training.objectives.base import Batch
from mull.training.objectives.evidence import Evidence, Scored, Scorer, check_reference
from mull.training.objectives.weight_statistics import RunningMoments

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM

ENTRY_POINTS = "mull.objectives"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Rho1Config(_Settings):
    """Weights by excess loss over a reference model (Rho-1, arXiv:2404.07965).

    The excess is signed: a token that the reference finds harder than the model counts less, not more.
    """

    mode: Literal["weighted", "token_skip"] = "token_skip"
    """``weighted``: softmax of the excess over all targets of a step. ``token_skip``: drop the lowest share of them."""

    temperature: float = Field(default=1.0, gt=0)
    """Nats of excess that multiply a weight by e; read by ``weighted``."""

    skip_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of a step's targets that ``token_skip`` drops."""


class CriticConfig(_Settings):
    """Weights by the advantage of a token under a value head: ``exp(A / β)``, whitened and clipped (arXiv:1910.00177)."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trade of bias against variance: 0 is the one-step TD error, 1 the outcome minus the value."""

    beta: float = Field(default=1.0, gt=0)
    """Standard deviations of advantage that multiply a weight by e."""

    min_weight: float = Field(default=0.1, ge=0)
    """Weights below are raised to it, before they are normalised."""

    max_weight: float = Field(default=3.0, gt=0)
    """Weights above are lowered to it, before they are normalised."""

    momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest step in the running mean and deviation that advantages are whitened with."""

    auxiliary_loss_coef: float = Field(default=0.1, ge=0)
    """Weight of the value head's squared error beside the token loss; its gradient reaches the trunk as well."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.min_weight >= self.max_weight:
            raise ValueError(f"min_weight={self.min_weight} must lie below max_weight={self.max_weight}.")
        return self


class GradientConfig(_Settings):
    """Weights by a target's own gradient of the unembedding, which is an outer product and needs no backward pass."""

    mode: Literal["norm", "alignment"] = "norm"
    """``norm``: ``‖p - e_y‖ · ‖h‖``. ``alignment``: its inner product with the gradient on held-out text, negative ones 0."""

    momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest step in the running mean that scores are divided by, and in the held-out gradient."""

    max_weight: float = Field(default=5.0, gt=0)
    """Weights above are lowered to it, before they are normalised."""


def baseline(evidence: Evidence) -> Tensor:
    """Every target counts the same."""
    return torch.ones(evidence.valid.shape, device=evidence.hidden.device)


def entropy(evidence: Evidence) -> Tensor:
    """What the model is uncertain of counts more (EAFT, arXiv:2601.02151)."""
    return entropy_weights(evidence.statistics.entropy, evidence.model.lm_head.out_features)


def dft(evidence: Evidence) -> Tensor:
    """What the model finds unlikely counts less (dynamic fine-tuning, arXiv:2508.05629)."""
    return dft_weights(evidence.statistics.loss)


class Rho1Weighted(Scorer):
    """``exp(excess / temperature)``; normalised, the softmax over the step."""

    def __init__(self, config: Rho1Config, reference: "MullForCausalLM") -> None:
        super().__init__(
            lambda evidence: rho1_weights(evidence.statistics.loss, evidence.reference_loss, config.temperature),
            reference,
        )
        self.config = config


class Rho1TokenSkip(Scorer):
    """1 for the targets of highest excess loss in the step, 0 for the others."""

    whole_step = True

    def __init__(self, config: Rho1Config, reference: "MullForCausalLM") -> None:
        super().__init__(lambda evidence: evidence.statistics.loss - evidence.reference_loss, reference)
        self.config = config

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Rank all targets of the step against each other."""
        return Scored(keep_highest(scores, valid, 1 - self.config.skip_share).to(scores.dtype))


class Critic(Scorer):
    """Weights by the advantage that a value head sees in each token.

    With the outcome of a document as the only reward, a token after which the outcome is likelier has a positive advantage.
    Documents without ``rewards`` in the batch count as right (outcome 1).

    Args:
        config: Discounts, limits, auxiliary loss.
        value_head: Estimates the outcome from a state of the trunk.
    """

    whole_step = True

    def __init__(self, config: CriticConfig, value_head: ValueHead) -> None:
        super().__init__(self._advantages)
        self.config = config
        self.companion = value_head
        self._moments = RunningMoments(config.momentum)

    def _advantages(self, evidence: Evidence) -> Tensor:
        return self._advantages_of(self._values(evidence.hidden), evidence)

    def _values(self, hidden: Tensor) -> Tensor:
        assert self.companion is not None
        return self.companion(hidden)

    def _advantages_of(self, values: Tensor, evidence: Evidence) -> Tensor:
        rewards = evidence.batch.get("rewards")
        rewards = torch.ones_like(values) if rewards is None else rewards.to(values.dtype)
        return advantages(
            values.detach(), rewards, evidence.valid, evidence.positions, self.config.gamma, self.config.gae_lambda
        )

    def settle(self, scores: Tensor, valid: Tensor, training: bool) -> Scored:
        """Whiten with running moments, this step's included, and clip."""
        among = scores[valid].double()
        sums = float(among.sum()), float(among.square().sum()), float(valid.sum())
        moments = self._moments
        if not training:
            moments = RunningMoments(self.config.momentum)
            moments.load_state_dict(self._moments.state_dict())
        if training or not moments.ready:
            moments.update(*sums)
        config = self.config
        weights, clipped = advantage_weights(
            scores, moments.mean, moments.std, config.beta, config.min_weight, config.max_weight
        )
        return Scored(weights, clipped)

    def auxiliary_loss(self, hidden: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor] | None:
        """Squared error of the values against lambda-returns."""
        if self.config.auxiliary_loss_coef == 0:
            return None
        total, count = self.value_error(hidden, evidence)
        return self.config.auxiliary_loss_coef * total, count

    def value_error(self, hidden: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Squared error summed over the valid targets, and their number. The gradient reaches `hidden`."""
        values = self._values(hidden)
        returns = lambda_returns(self._advantages_of(values, evidence), values.detach(), evidence.valid)
        count = evidence.valid.sum()
        return value_loss(values, returns, evidence.valid), count

    def state_dict(self) -> dict[str, Any]:
        """Running moments of the advantage."""
        return {"moments": self._moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._moments.load_state_dict(state["moments"])


class GradientNorm(Scorer):
    """Norm of each target's gradient of the unembedding, over its running mean.

    The running mean is that of the steps before: in the first step all targets count the same.
    """

    def __init__(self, config: GradientConfig) -> None:
        super().__init__(self._relative)
        self.config = config
        self._moments = RunningMoments(config.momentum)
        self._seen: list[Tensor] = []

    def begin_step(self, model: "MullForCausalLM") -> None:
        """Forget what calls outside a step have shown."""
        self._seen = []

    def _raw(self, evidence: Evidence) -> Tensor:
        statistics = evidence.statistics
        return gradient_norm(statistics.loss, statistics.sum_of_squares, evidence.hidden_norm)

    def _relative(self, evidence: Evidence) -> Scored:
        raw = self._raw(evidence)
        if evidence.model.training:
            among = raw[evidence.valid].double()
            self._seen.append(torch.stack([among.sum(), among.square().sum(), evidence.valid.sum().double()]))
        if not self._moments.ready:
            return Scored(torch.ones_like(raw))
        relative = raw / max(self._moments.mean, torch.finfo(raw.dtype).tiny)
        return Scored(relative.clamp(max=self.config.max_weight), relative > self.config.max_weight)

    def end_step(self) -> dict[str, float]:
        """Advance the running mean by the step's scores."""
        if not self._seen:
            return {}
        total, squares, count = global_sum(torch.stack(self._seen).sum(0)).tolist()
        self._seen = []
        self._moments.update(total, squares, count)
        return {"gradient_score": self._moments.mean}

    def state_dict(self) -> dict[str, Any]:
        """Running mean of the score."""
        return {"moments": self._moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._moments.load_state_dict(state["moments"])


class GradientAlignment(GradientNorm):
    """How far a step on a target alone would lower the held-out loss, to first order and through the unembedding only.

    The inner product of a target's gradient with that of a held-out batch, the latter averaged over steps; negative ones
    count 0. Each step runs one held-out batch forward.

    Args:
        config: Limits and momentum.
        held_out: Number of a batch to the batch, a pure function; all ranks read the same ones.
        vocabulary: V and D, the shape of the unembedding.
    """

    def __init__(self, config: GradientConfig, held_out: Callable[[int], Batch], vocabulary: tuple[int, int]) -> None:
        super().__init__(config)
        self._held_out = held_out
        self._direction = torch.zeros(vocabulary)
        self._step = 0

    def begin_step(self, model: "MullForCausalLM") -> None:
        """Bring the held-out gradient up to date, in training."""
        super().begin_step(model)
        if not model.training:
            return
        gradient = self._gradient(model)
        newest = 1.0 if self._step == 0 else self.config.momentum
        self._direction = self._direction.to(gradient).lerp(gradient, newest)
        self._step += 1

    def _gradient(self, model: "MullForCausalLM") -> Tensor:
        """Mean gradient of the unembedding on the next held-out batch ``[V, D]``."""
        batch = {name: tensor.to(model.device) for name, tensor in self._held_out(self._step).items()}
        with torch.no_grad():
            (hidden,) = model.early_decoded(
                batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                position_ids=batch.get("position_ids"),
            )
            evidence = Evidence(model, batch, hidden)
            rows, targets = hidden[:, :-1][evidence.valid[:, 1:]], batch["labels"][evidence.valid]
            gradient = torch.zeros_like(model.lm_head.weight, dtype=torch.float32)
            share = rows.new_full((len(rows),), 1 / max(len(rows), 1), dtype=torch.float32)
            cross_entropy_gradients(rows, model.lm_head.weight, targets, share, gradient)
        return gradient

    def evidence(self, model: "MullForCausalLM", batch: Batch, hidden: Tensor) -> Evidence:
        """Add the held-out gradient."""
        direction = self._direction.to(hidden.device) if self._step else self._gradient(model)
        return Evidence(model, batch, hidden.detach(), direction=direction)

    def _raw(self, evidence: Evidence) -> Tensor:
        alignment = evidence.statistics.alignment
        assert alignment is not None
        return alignment.clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        """Running mean of the score, the held-out gradient, and the number of the next held-out batch."""
        return super().state_dict() | {"step": self._step, "direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(state)
        self._step, self._direction = state["step"], state["direction"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the algorithms are made of; each row of `SCORERS` takes what it needs."""

    rho1: Rho1Config = field(default_factory=Rho1Config)
    critic: CriticConfig = field(default_factory=CriticConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    reference: "MullForCausalLM | None" = None
    """For ``rho1-wmtp``: frozen, in evaluation mode, on the model's device, with the model's vocabulary."""

    value_head: ValueHead | None = None
    """For ``critic-wmtp``: trained beforehand with `mull.training.objectives.critic.ValueTraining`."""

    held_out: Callable[[int], Batch] | None = None
    """For ``gradient-wmtp`` by alignment: number of a held-out batch to the batch."""


def _rho1(model: "MullForCausalLM", parts: Parts) -> Scorer:
    if parts.reference is None:
        raise ValueError("rho1-wmtp compares with a reference model, and none was given.")
    check_reference(model, parts.reference)
    kind = Rho1Weighted if parts.rho1.mode == "weighted" else Rho1TokenSkip
    return kind(parts.rho1, parts.reference)


def _critic(_model: "MullForCausalLM", parts: Parts) -> Scorer:
    if parts.value_head is None:
        raise ValueError(
            "critic-wmtp reads a value head, and none was given: train one first, or let a recipe do both."
        )
    return Critic(parts.critic, parts.value_head)


def _gradient(model: "MullForCausalLM", parts: Parts) -> Scorer:
    if parts.gradient.mode == "norm":
        return GradientNorm(parts.gradient)
    if parts.held_out is None:
        raise ValueError(
            "gradient-wmtp with mode alignment compares with the gradient on held-out text, and none was given."
        )
    return GradientAlignment(parts.gradient, parts.held_out, (model.lm_head.out_features, model.lm_head.in_features))


FUNCTIONS: dict[str, Callable[[Evidence], Tensor | Scored]] = {
    "baseline-mtp": baseline,
    "dft": dft,
    "entropy": entropy,
}
"""Name of an algorithm to its function, for those that need nothing but the evidence."""

SCORERS: dict[str, Callable[["MullForCausalLM", Parts], Scorer]] = {
    "critic-wmtp": _critic,
    "gradient-wmtp": _gradient,
    "rho1-wmtp": _rho1,
}
"""Name of an algorithm to what makes its scorer, for those with settings, a memory or a second model."""


def algorithm_names() -> list[str]:
    """Names of all algorithms, those of other packages included."""
    return sorted({*FUNCTIONS, *SCORERS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def make_scorer(name: str, model: "MullForCausalLM", parts: Parts | None = None) -> Scorer:
    """Make the scorer of an algorithm for a model.

    Args:
        name: A row of `FUNCTIONS` or `SCORERS`, or an entry point of the group ``mull.objectives``, whose value is a function
            from `Evidence` to scores ``[B, T]``. Names of mull's own come first.
        model: The model that will be trained.
        parts: Settings and further models; the defaults serve the algorithms that need none.

    Raises:
        ValueError: unknown name, or a part that the algorithm needs is missing or does not fit.
    """
    if name in FUNCTIONS:
        return Scorer(FUNCTIONS[name])
    if name in SCORERS:
        return SCORERS[name](model, parts or Parts())
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return Scorer(point.load())
    raise ValueError(f"The algorithm {name!r} is not known. Known are {', '.join(algorithm_names())}.")
