"""Token-weighted multi-token prediction: one contract for every weighting algorithm.

    L = Σ_k (c_k / N_k) Σ_t w_{t,k} · CE(P_k(x_{t+1+k} | x_{≤t}), x_{t+1+k})

``w_{t,k} = s_{t+1+k}`` is the score of the *target* token, without gradient, and 0 where there is no target. Scores are divided
by their mean over all valid targets of the optimizer step, on all ranks, so algorithms differ in emphasis and not in learning
rate. Signed scores, such as advantages, are not divided; see `Scorer.signed`.

Shapes: B batch, T tokens, D model width, H active heads, main head included; M micro-batches of a rank, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mull.model.causal_lm import MullForCausalLM
from mull.ops.targets import IGNORED, align, label_positions, require_targets, targets_of
from mull.runtime.distributed import gather, global_sum, rank, same_everywhere, world_size
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan, batch_states, layout, mixed_seed
from mull.training.objectives.evidence import Evidence, Scored, Scorer
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Settings
from mull.training.objectives.weight_statistics import WeightStatistics, matched_random, shuffle

Control = Literal["none", "shuffled", "random"]


class HeadTraining(Settings):
    """How the extra heads, which predict further tokens, are trained along with the model."""

    weights: Literal["decay", "uniform"] = "decay"
    """Weight of each head. ``decay``: 1 for the main head, and what `MTPConfig` says for the extra ones. ``uniform``: every
    target of every head counts the same (arXiv:2404.19737)."""

    detach: bool = False
    """Keep the gradient of the extra heads out of the trunk."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the extra heads' gradient into the trunk rises linearly from 0. The heads learn from the first step."""

    curriculum_steps: int = Field(default=0, ge=0)
    """Steps over which the number of trained extra heads grows from one to all (forward curriculum); 0 trains all from the
    start."""

    def n_active(self, n_heads: int, step: int) -> int:
        """Extra heads that are trained in a step; steps count from 0."""
        if not n_heads or step >= self.curriculum_steps:
            return n_heads
        return min(1 + step * n_heads // self.curriculum_steps, n_heads)

    def trunk_gradient(self, step: int) -> float:
        """Factor of the extra heads' gradient into the trunk in a step; steps count from 0."""
        if self.detach:
            return 0.0
        return 1.0 if step >= self.warmup_steps else step / self.warmup_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWeights:
    """Weights of one micro-batch."""

    weights: Tensor
    """``[B, T, H]`` for the active heads, 0 where there is no target; not normalised."""

    clipped: Tensor | None = None
    """``[B, T, H]``: where the algorithm's limits changed a weight."""

    mean: Tensor | None = None
    """Mean weight over the targets of the whole step, if the step was weighted at once."""

    seen: Sequence[Tensor] = ()
    """`Scored.seen` for `Scorer.end_step`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedPlan(StepPlan):
    """A step of `WeightedMTP`."""

    scoring: StepPlan
    """The scorer's own plan."""

    n_targets: Tensor
    """``[H]``: targets of each active head in the whole step."""

    head_scale: Tensor
    """``[H]``: head weight per target."""

    weights: Sequence[TokenWeights] | None = None
    """By micro-batch; None leaves the weighting to `WeightedMTP.loss`."""


class _Seen(NamedTuple):
    """What a micro-batch tells `WeightedMTP.end_step`."""

    statistics: WeightStatistics
    losses: Tensor
    """``[2, H]`` fp64: sum of the losses, and number of computed targets."""

    marked: Tensor | None
    """``[2]`` fp64: sum of the absolute weights of marked targets, and their number."""

    scores: Sequence[Tensor]


class WeightedMTP(Objective):
    """Cross-entropy of all heads, weighted by token.

    A batch may mark some of its tokens, ``marked [B, T]``: their mean weight is logged as ``weights/marked``. No algorithm sees
    the mark.

    A model without heads trains its main head only. Controls, and algorithms that rank the targets of a step against each other,
    need the scores of all its micro-batches first. That costs another forward pass without gradient, unless the step is a single
    micro-batch.

    Args:
        scorer: The weighting.
        iterations: Think iterations of a step.
        heads: Weights and schedule of the heads.
        control: ``shuffled``: the algorithm's weights at random targets of the same head; ``random``: log-normal weights with the
            same mean and deviation. Neither depends on the tokens.
        seed: Seed of the controls, and of what the algorithm samples.
    """

    def __init__(
        self,
        scorer: Scorer,
        iterations: IterationSampling,
        heads: HeadTraining | None = None,
        control: Control = "none",
        seed: int = 0,
    ) -> None:
        self.iterations = iterations
        self.heads = heads or HeadTraining()
        self.control = control
        self.seed = seed
        self.algorithm = scorer.name
        self.settings = scorer.config
        self.companion = scorer.companion
        self._scorer = scorer
        self._step = 0

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> WeightedPlan:
        """Draw the iterations, count the step's targets, and weight them if that takes all of them.

        Raises:
            ValueError: no label of the step is a target.
        """
        iterations = same_everywhere(self.iterations.sample())
        scoring = self._scorer.plan_step(model, batches, iterations, mixed_seed(self.seed, self._step))
        n_targets = self._count(model, scoring.batches)
        require_targets(n_targets[0], scoring.batches[0]["labels"])
        scale = self._head_scale(model, n_targets)
        plan = WeightedPlan(
            batches=scoring.batches,
            iterations=iterations,
            depths=self.iterations.depths([batch["input_ids"].shape for batch in scoring.batches]),
            scoring=scoring,
            n_targets=n_targets,
            head_scale=scale,
        )
        if not self.needs_whole_step or len(batches) * world_size() == 1:
            return plan
        evidence = [
            self._scorer.evidence(model, batch, self._hidden(model, plan, index), scoring)
            for index, batch in enumerate(plan.batches)
        ]
        return replace(plan, weights=self._settle(plan, evidence, model.training))

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the weighted loss over the targets of all heads.

        Returns:
            The loss in nats, with weights that are not yet normalised; the weight; and the metric ``iterations``. ``weight`` is
            the sum of this batch's weights divided by the targets in the step. Summed over the step it is the mean weight, so
            the loop's division makes the mean 1. With signed scores it is this batch's share of the targets; shares sum to 1,
            so the division changes nothing.
        """
        assert isinstance(plan, WeightedPlan)
        batch = plan.batches[index]
        hidden = self._hidden(model, plan, index)
        evidence = self._scorer.evidence(model, batch, hidden, plan.scoring)
        token = plan.weights[index] if plan.weights is not None else self._weigh(plan, evidence, model.training)
        targets = targets_of(batch["labels"], evidence.positions, token.weights.shape[-1])
        valid = targets != IGNORED
        coefficients = token.weights * plan.head_scale
        total, losses = self._head_losses(model, batch, hidden, targets, coefficients)
        weight = (valid if self._scorer.signed else token.weights).sum() / plan.n_targets.sum()
        auxiliary = self._scorer.auxiliary_loss(hidden, evidence)
        if auxiliary is not None:
            # The loop divides by the step's mean weight, which must not scale the companion's loss.
            total = total + auxiliary[0] / plan.n_targets[0] * (weight if token.mean is None else token.mean)
        computed = valid & (coefficients != 0)
        statistics = WeightStatistics.measure(token.weights, valid, token.clipped)
        summed = torch.stack([losses.double().sum((0, 1)), computed.sum((0, 1)).double()])
        seen = _Seen(statistics, summed, _marked(token.weights, valid, batch.get("marked")), token.seen)
        return LossOutput(total, weight, {"iterations": float(plan.iterations)}, seen)

    def end_step(self, plan: StepPlan, seen: Sequence[_Seen]) -> dict[str, float]:
        """Statistics of the step's weights, mean loss of each head over the targets it computed, and the active heads."""
        assert isinstance(plan, WeightedPlan)
        metrics = self._scorer.end_step(plan.scoring, [sums for one in seen for sums in one.scores])
        metrics |= reduce(add, [one.statistics for one in seen]).over_ranks().report()
        if marked := [one.marked for one in seen if one.marked is not None]:
            weight, count = global_sum(reduce(add, marked)).tolist()
            if count:
                metrics["weights/marked"] = weight / count / metrics["weights/mean"]
        sums, counts = global_sum(reduce(add, [one.losses for one in seen]))
        means = (sums / counts.clamp(min=1)).tolist()
        metrics |= {f"head{k}_loss": mean for k, mean in enumerate(means) if counts[k]}
        metrics["active_heads"] = float(len(means) - 1)
        self._step += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Number of steps, and what the algorithm remembers."""
        scorer = {f"scorer.{name}": value for name, value in self._scorer.state_dict().items()}
        return {"step": self._step, **scorer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._step = state["step"]
        scorer = {name.removeprefix("scorer."): value for name, value in state.items() if name.startswith("scorer.")}
        self._scorer.load_state_dict(scorer)

    @property
    def scorer(self) -> Scorer:
        """The weighting."""
        return self._scorer

    @property
    def reference(self) -> MullForCausalLM | None:
        """The model that the weighting compares with, if it has one."""
        return self._scorer.reference

    @property
    def needs_whole_step(self) -> bool:
        """Whether no target can be weighted before all targets of the step are scored."""
        return self._scorer.whole_step or self.control != "none"

    def _hidden(self, model: MullForCausalLM, plan: StepPlan, index: int) -> Tensor:
        backprop = self.iterations.backprop(plan.iterations)
        return batch_states(model, plan.batches[index], plan.iterations, backprop, plan.depths_of(index))

    def _count(self, model: MullForCausalLM, batches: Sequence[Batch]) -> Tensor:
        """Targets of each active head in the whole step, ``[H]``."""
        n_heads = 0 if model.mtp_config is None else model.mtp_config.num_predict_tokens
        n_active = 1 + self.heads.n_active(n_heads, self._step)
        counts = torch.zeros(n_active, dtype=torch.int64, device=model.device)
        for batch in batches:
            targets = targets_of(batch["labels"], label_positions(**layout(batch)), n_active)
            counts += (targets != IGNORED).sum((0, 1))
        return global_sum(counts)

    def _head_scale(self, model: MullForCausalLM, n_targets: Tensor) -> Tensor:
        """``c_k / N_k`` for each active head."""
        if self.heads.weights == "uniform" or model.mtp_config is None:
            return (1 / n_targets.sum().clamp(min=1)).expand(len(n_targets))
        weights = torch.tensor(model.mtp_config.head_weights[: len(n_targets)], device=n_targets.device)
        return weights / n_targets.clamp(min=1)

    def _head_losses(
        self, model: MullForCausalLM, batch: Batch, hidden: Tensor, targets: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``Σ coefficients · CE`` and the loss of each target; the main head at the scorer's temperature."""
        options = {**layout(batch), "trunk_gradient": self.heads.trunk_gradient(self._step)}
        ids, temperature = batch["input_ids"], self._scorer.temperature
        if temperature == 1:
            return model.head_losses(hidden, ids, targets, coefficients, **options)
        total, losses = model.head_losses(hidden / temperature, ids, targets[..., :1], coefficients[..., :1], **options)
        if targets.shape[-1] == 1:
            return total, losses
        extra = coefficients.clone()
        extra[..., 0] = 0
        total_extra, losses_extra = model.head_losses(hidden, ids, targets, extra, **options)
        return total + total_extra, torch.cat([losses, losses_extra[..., 1:]], -1)

    def _weigh(self, plan: WeightedPlan, evidence: Evidence, training: bool) -> TokenWeights:
        """Weights of one micro-batch on its own."""
        if self.needs_whole_step:
            return self._settle(plan, [evidence], training)[0]
        return self._aligned(plan, evidence, self._scorer(evidence))

    def _aligned(self, plan: WeightedPlan, evidence: Evidence, scored: Scored) -> TokenWeights:
        """Bring scores of targets to the positions and heads that predict them."""
        n_active = len(plan.n_targets)
        valid = _valid(evidence, n_active)
        clipped = None if scored.clipped is None else align(scored.clipped, n_active) & valid
        weights = torch.where(valid, align(scored.scores, n_active), 0)
        if self._scorer.signed:
            weights[..., 1:].clamp_(min=0)
        return TokenWeights(weights=weights, clipped=clipped, seen=() if scored.seen is None else (scored.seen,))

    @torch.no_grad()
    def _settle(self, plan: WeightedPlan, evidence: Sequence[Evidence], training: bool) -> list[TokenWeights]:
        """Weight this rank's micro-batches, with the scores of the whole step known."""
        scored = [self._scorer(one) for one in evidence]
        scores = _Step([one.scores for one in scored])
        valid = _Step([one.valid for one in evidence])
        settled = self._scorer.settle(scores.everything, valid.everything, training)
        final = scores.own(settled.scores)
        clipped = [None] * len(final) if settled.clipped is None else scores.own(settled.clipped)
        aligned = [
            self._aligned(plan, one, Scored(scores=score, clipped=mark, seen=own.seen))
            for one, own, score, mark in zip(evidence, scored, final, clipped, strict=True)
        ]
        if self.control != "none":
            aligned = self._controlled(evidence, aligned)
        total = global_sum(torch.stack([one.weights.sum() for one in aligned]).sum())
        aligned = [replace(one, mean=total / plan.n_targets.sum()) for one in aligned]
        if settled.seen is not None:
            aligned[0] = replace(aligned[0], seen=(*aligned[0].seen, settled.seen))
        return aligned

    def _controlled(self, evidence: Sequence[Evidence], treated: Sequence[TokenWeights]) -> list[TokenWeights]:
        """Replace the weights by ones that do not depend on the tokens."""
        everything = _Step([one.weights for one in treated])
        targets = _Step([_valid(one, everything.everything.shape[-1]) for one in evidence])
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self._step))
        function = shuffle if self.control == "shuffled" else matched_random
        own = everything.own(function(everything.everything, targets.everything, generator))
        return [replace(one, weights=weights, clipped=None) for one, weights in zip(treated, own, strict=True)]


def _valid(evidence: Evidence, n_heads: int) -> Tensor:
    """Where each head has a target, ``[B, T, H]``."""
    return targets_of(evidence.batch["labels"], evidence.positions, n_heads) != IGNORED


def _marked(weights: Tensor, valid: Tensor, marked: Tensor | None) -> Tensor | None:
    """Sum of the absolute weights of marked targets, and their number."""
    if marked is None:
        return None
    chosen = align(marked, weights.shape[-1]) & valid
    return torch.stack([weights[chosen].abs().double().sum(), chosen.sum().double()])


class _Step:
    """One tensor ``[B, T, ...]`` per micro-batch of this rank; `everything` is those of all ranks in the order of their numbers.

    Shorter rows are padded with 0 on the right.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._lengths = [part.shape[1] for part in parts]
        longest = int(torch.stack(gather(torch.tensor(max(self._lengths)))).max())
        padded = [F.pad(part, (*(0, 0) * (part.ndim - 2), 0, longest - part.shape[1])) for part in parts]
        own = torch.stack(padded)  # (M, B, T, ...)
        self._whole = torch.stack(gather(own), dim=1)  # (M, R, B, T, ...)
        self.everything = self._whole.flatten(0, 2)

    def own(self, everything: Tensor) -> list[Tensor]:
        """This rank's part of a tensor like `everything`, by micro-batch."""
        parts = everything.unflatten(0, self._whole.shape[:3])[:, rank()]
        return [part[:, :length] for part, length in zip(parts, self._lengths, strict=True)]
