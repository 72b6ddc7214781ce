"""Token-weighted multi-token prediction: one contract for every weighting algorithm.

    L = Σ_k (c_k / N_k) Σ_t w_{t,k} · CE(P_k(x_{t+1+k} | x_{≤t}), x_{t+1+k})

``w_{t,k} = s_{t+1+k}`` is the score of the *target* token, without gradient, 0 where there is no target, and divided by its mean
over all valid targets of the optimizer step, on all ranks: algorithms differ in emphasis and not in learning rate. Signed scores,
such as advantages, are not divided; see `Scorer.signed`.
Shapes: B batch, T tokens, D model width, H heads, the main one included; M micro-batches of a rank, R ranks.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from mull.ops.targets import align, label_positions, targets_of
from mull.runtime.distributed import gather, global_sum, rank, same_everywhere, world_size
from mull.training.objectives.base import Batch, LossOutput, Objective
from mull.training.objectives.evidence import Evidence, Scored, Scorer
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.weight_statistics import WeightStatistics, matched_random, shuffle

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM

Control = Literal["none", "shuffled", "random"]


class HeadTraining(BaseModel):
    """How the heads behind the main one are trained along with the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weights: Literal["decay", "uniform"] = "decay"
    """Weight of each head. ``decay``: 1 for the main head, and what `MTPConfig` says for the others. ``uniform``: every target of
    every head counts the same (arXiv:2404.19737)."""

    detach: bool = False
    """Keep the gradient of the heads behind the main one out of the trunk."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which that gradient rises linearly from 0; the heads themselves learn from the first step."""

    curriculum_steps: int = Field(default=0, ge=0)
    """Steps over which the number of trained heads grows from one behind the main one to all (forward curriculum); 0 trains all
    from the start."""

    def n_active(self, n_heads: int, step: int) -> int:
        """Heads behind the main one that are trained in a step, counted from 0."""
        if not n_heads or step >= self.curriculum_steps:
            return n_heads
        return min(1 + step * n_heads // self.curriculum_steps, n_heads)

    def trunk_gradient(self, step: int) -> float:
        """Factor of the heads' gradient into the trunk in a step, counted from 0."""
        if self.detach:
            return 0.0
        return 1.0 if step >= self.warmup_steps else step / self.warmup_steps


class WeightedMTP(Objective):
    """Cross-entropy of all heads, weighted by token.

    A batch may mark some of its tokens, ``marked [B, T]``: their mean weight is logged as ``weights/marked``, and no algorithm
    sees the mark.

    A model without heads trains its main head only. Algorithms that rank the targets of a step against each other, and
    controls, need the scores of all its micro-batches first: that is a further forward pass without gradient, unless the step is
    one micro-batch.

    Args:
        scorer: The weighting, from `mull.training.objectives.weightings.make_scorer`.
        iterations: Think iterations of a step.
        heads: Weights and schedule of the heads.
        control: ``shuffled``: the algorithm's weights at random targets of the same head; ``random``: log-normal weights of the
            same mean and deviation. Neither knows what a token is.
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
        self._drawn: int | None = None
        self._head_scale = torch.zeros(0)
        self._n_targets = torch.zeros(0)
        self._statistics: WeightStatistics | None = None
        self._losses: Tensor | None = None
        self._marked: Tensor | None = None

    def prepare(self, model: "MullForCausalLM", batches: Sequence[Batch]) -> Sequence[Batch]:
        """Draw the iterations, count the step's targets, and weigh them where that takes all of them."""
        self._drawn = same_everywhere(self.iterations.sample())
        places = range(rank(), len(batches) * world_size(), world_size())
        seeds = [_mixed(self.seed, self._step, place) for place in places]
        batches = self._scorer.rollout(model, batches, self._drawn, seeds)
        self._count(model, batches)
        self._scorer.begin_step(model)
        if not self._settles or len(batches) * world_size() == 1:
            return batches
        evidence = [self._scorer.evidence(model, batch, self._hidden(model, batch)) for batch in batches]
        weighed = self._settle(model, evidence)
        return [{**batch, **weights} for batch, weights in zip(batches, weighed, strict=True)]

    def __call__(self, model: "MullForCausalLM", batch: Batch) -> LossOutput:
        """Sum the weighted loss over the targets of all heads.

        Returns:
            The loss in nats (per target of the step, before the weights are normalised), the weight, and the metric
            ``iterations``. The weight is that of these targets over the number of the step's: the loop's division by the sum
            over the step normalises the weights. For signed scores it is these targets' share, and the loop divides by 1.

        Raises:
            ValueError: no label of the batch is a target.
        """
        outside_step = self._drawn is None
        if outside_step:
            (batch,) = self.prepare(model, [batch])
        iterations = self._drawn
        assert iterations is not None
        hidden = self._hidden(model, batch)
        evidence = self._scorer.evidence(model, batch, hidden)
        self._check_targets(evidence)
        weights, clipped = self._weights(model, batch, evidence)  # (B, T, H) of the active heads
        targets = targets_of(batch["labels"], evidence.positions, weights.shape[-1])
        coefficients = weights * self._head_scale
        total, losses = self._head_losses(model, batch, hidden, targets, coefficients)
        weight = ((targets >= 0) if self._scorer.signed else weights).sum() / self._n_targets.sum()
        auxiliary = self._scorer.auxiliary_loss(hidden, evidence)
        if auxiliary is not None:
            # The loop divides by the mean weight of the step, which is the weights' business alone.
            total = total + auxiliary[0] / self._n_targets[0] * batch.get("mean_weight", weight)
        if outside_step:
            self._drawn = None
        else:
            self._note(weights, targets >= 0, clipped)
            self._note_marked(weights, targets >= 0, batch.get("marked"))
            self._note_losses(losses, (targets >= 0) & (coefficients != 0))
        return LossOutput(total, weight, {"iterations": float(iterations)})

    def end_step(self) -> dict[str, float]:
        """Statistics of the step's weights, mean loss of each head over the targets it computed, and the active heads."""
        metrics = self._scorer.end_step()
        if self._statistics is not None:
            metrics |= self._statistics.over_ranks().report()
        if self._marked is not None:
            weight, count = global_sum(self._marked).tolist()
            if count:
                metrics["weights/marked"] = weight / count / metrics["weights/mean"]
        if self._losses is not None:
            sums, counts = global_sum(self._losses)
            means = (sums / counts.clamp(min=1)).tolist()
            metrics |= {f"head{k}_loss": mean for k, mean in enumerate(means) if counts[k]}
            metrics["active_heads"] = float(len(means) - 1)
        self._statistics, self._losses, self._marked, self._drawn = None, None, None, None
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
    def _settles(self) -> bool:
        return self._scorer.whole_step or self.control != "none"

    def _hidden(self, model: "MullForCausalLM", batch: Batch) -> Tensor:
        assert self._drawn is not None
        return model.early_decoded(
            batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            think_iterations=self._drawn,
            backprop_iterations=self.iterations.backprop(self._drawn),
        )[-1]

    def _n_active(self, model: "MullForCausalLM") -> int:
        n_heads = 0 if model.mtp_config is None else model.mtp_config.num_predict_tokens
        return 1 + self.heads.n_active(n_heads, self._step)

    def _count(self, model: "MullForCausalLM", batches: Sequence[Batch]) -> None:
        """Count the targets of each head in the whole step, and derive what a head's target counts."""
        n_active = self._n_active(model)
        counts = torch.zeros(n_active, dtype=torch.int64, device=model.device)
        for batch in batches:
            positions = label_positions(batch.get("attention_mask"), batch.get("position_ids"))
            counts += (targets_of(batch["labels"], positions, n_active) >= 0).sum((0, 1))
        counts = global_sum(counts)
        if self.heads.weights == "uniform" or model.mtp_config is None:
            self._head_scale = (1 / counts.sum().clamp(min=1)).expand(n_active)
        else:
            weights = torch.tensor(model.mtp_config.head_weights[:n_active], device=counts.device)
            self._head_scale = weights / counts.clamp(min=1)
        self._n_targets = counts

    def _head_losses(
        self, model: "MullForCausalLM", batch: Batch, hidden: Tensor, targets: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``Σ coefficients · CE`` and the loss of each target; the main head at the scorer's temperature."""
        compute = partial(
            model.head_losses,
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            trunk_gradient=self.heads.trunk_gradient(self._step),
        )
        ids, temperature = batch["input_ids"], self._scorer.temperature
        if temperature == 1:
            return compute(hidden, ids, targets, coefficients)
        total, losses = compute(hidden / temperature, ids, targets[..., :1], coefficients[..., :1])
        if targets.shape[-1] == 1:
            return total, losses
        further = coefficients.clone()
        further[..., 0] = 0
        total_further, losses_further = compute(hidden, ids, targets, further)
        return total + total_further, torch.cat([losses, losses_further[..., 1:]], -1)

    def _weights(self, model: "MullForCausalLM", batch: Batch, evidence: Evidence) -> tuple[Tensor, Tensor | None]:
        if "weights" in batch:
            return batch["weights"], batch.get("clipped")
        if self._settles:
            (settled,) = self._settle(model, [evidence])
            return settled["weights"], settled.get("clipped")
        return self._aligned(model, evidence, self._scorer(evidence))

    def _aligned(self, model: "MullForCausalLM", evidence: Evidence, scored: Scored) -> tuple[Tensor, Tensor | None]:
        """Bring scores of targets to the positions and heads that predict them, ``[B, T, H]``."""
        n_active = self._n_active(model)
        valid = targets_of(evidence.batch["labels"], evidence.positions, n_active) >= 0
        clipped = None if scored.clipped is None else align(scored.clipped, n_active) & valid
        weights = torch.where(valid, align(scored.scores, n_active), 0)
        if self._scorer.signed:
            weights[..., 1:].clamp_(min=0)
        return weights, clipped

    @torch.no_grad()
    def _settle(self, model: "MullForCausalLM", evidence: Sequence[Evidence]) -> list[dict[str, Tensor]]:
        """Weigh micro-batches with the whole step in sight."""
        scores = _Step([self._scorer(one).scores for one in evidence])
        valid = _Step([one.valid for one in evidence])
        settled = self._scorer.settle(scores.everything, valid.everything, model.training)
        final = scores.own(settled.scores)
        clipped = [None] * len(final) if settled.clipped is None else scores.own(settled.clipped)
        aligned = [
            self._aligned(model, one, Scored(score, mark))
            for one, score, mark in zip(evidence, final, clipped, strict=True)
        ]
        weights = [weight for weight, _ in aligned]
        if self.control != "none":
            weights, aligned = self._controlled(model, evidence, weights), [(weight, None) for weight in weights]
        mean = global_sum(torch.stack([weight.sum() for weight in weights]).sum()) / self._n_targets.sum()
        return [
            {"weights": weight, "mean_weight": mean} | ({} if mark is None else {"clipped": mark})
            for weight, (_, mark) in zip(weights, aligned, strict=True)
        ]

    def _controlled(
        self, model: "MullForCausalLM", evidence: Sequence[Evidence], weights: Sequence[Tensor]
    ) -> list[Tensor]:
        n_active = self._n_active(model)
        everything = _Step(weights)
        targets = _Step([targets_of(one.batch["labels"], one.positions, n_active) >= 0 for one in evidence])
        generator = torch.Generator().manual_seed(_mixed(self.seed, self._step))
        function = shuffle if self.control == "shuffled" else matched_random
        return everything.own(function(everything.everything, targets.everything, generator))

    def _check_targets(self, evidence: Evidence) -> None:
        if self._n_targets[0] == 0:
            raise ValueError(
                f"No label of this batch of shape {tuple(evidence.batch['labels'].shape)} is a target: all are -100 after the "
                "shift by one (the first token of a row or document has no prediction). Drop such rows from the data."
            )

    def _note(self, weights: Tensor, valid: Tensor, clipped: Tensor | None) -> None:
        measured = WeightStatistics.measure(weights, valid, clipped)
        self._statistics = measured if self._statistics is None else self._statistics + measured

    def _note_marked(self, weights: Tensor, valid: Tensor, marked: Tensor | None) -> None:
        if marked is None:
            return
        chosen = align(marked, weights.shape[-1]) & valid
        sums = torch.stack([weights[chosen].abs().double().sum(), chosen.sum().double()])
        self._marked = sums if self._marked is None else self._marked + sums

    def _note_losses(self, losses: Tensor, computed: Tensor) -> None:
        sums = torch.stack([losses.double().sum((0, 1)), computed.sum((0, 1)).double()])
        self._losses = sums if self._losses is None else self._losses + sums


class _Step:
    """One tensor ``[B, T, ...]`` per micro-batch, and all of the step's in the order of their numbers.

    Rows may differ in length; shorter ones are padded with 0 on the right.
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


def _mixed(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big")
