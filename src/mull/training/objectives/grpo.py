"""Group-relative policy optimisation: the model learns from the rewards of its own samples (GRPO, arXiv:2402.03300).

Each prompt is answered several times, and an answer is worth its reward relative to the other answers to its prompt. Samples
serve one update, so the ratio of the new to the old policy is 1, nothing is clipped, and the gradient of a step is exactly

    -1/N Σ_t (A_t - β (1 - e^{δ_t})) ∇ ln p(x_t | x_{<t}),        δ = ln p_ref - ln p

over the N generated tokens of the step, on all ranks. That is weighted cross-entropy with signed weights, which is what
`mull.training.objectives.weighted_mtp.WeightedMTP` computes. The second part is the penalty ``β k3`` with ``k3 = e^δ - δ - 1``,
whose derivative with respect to ``ln p`` is ``β (1 - e^δ)``.

Shapes: B prompts, G samples of each, N = B·G rows, P prompt tokens, L completion tokens, T = P + L.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mull.decoding.drafting import Drafter
from mull.decoding.rollouts import rollouts
from mull.model.causal_lm import MullForCausalLM
from mull.ops.targets import IGNORED
from mull.ops.token_weights import MAX_EXPONENT, group_advantages
from mull.runtime.distributed import gather_objects, global_sum, rank, world_size
from mull.runtime.timing import synchronize
from mull.training.objectives.base import Batch, StepPlan, evaluating, mixed_seed
from mull.training.objectives.evidence import Evidence, Scored, Scorer, check_reference
from mull.training.objectives.resources import Graded, Resources, Reward, Settings


class GRPOConfig(Settings):
    """How answers are sampled and compared."""

    group_size: int = Field(default=8, ge=2, le=10_000)
    """Answers per prompt. A micro-batch of B prompts trains on ``B * group_size`` rows."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer in tokens, its end included. A truncated answer is graded and trained on as it is."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits when sampling, in the loss of the main head and in the penalty, so the trained distribution is the one
    sampled from. Extra heads learn the samples at temperature 1."""

    normalise_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards. ``False`` is Dr. GRPO's choice (arXiv:2503.20783)."""

    kl_coef: float = Field(default=0.0, ge=0)
    """β: weight of the penalty for leaving the reference, in reward per nat; 0 needs no reference."""

    draft_length: int = Field(default=0, ge=0, le=64)
    """Tokens that the model's extra heads draft per round of sampling. Answers keep their distribution, and may come faster."""

    compile_rounds: bool = False
    """Compile the rounds of sampling, see `mull.generate`."""


class GRPOSection(GRPOConfig):
    """Reinforcement by the relative reward of sampled answers."""

    sources = frozenset({"reward", "reference", "workers"})

    reward: str
    """What grades an answer: ``arithmetic``, or ``programs``, which runs it in the sandbox."""

    workers: int | None = Field(default=None, ge=1, le=1024)
    """Of ``programs``: programs that run at once, on each rank; without it, one per core of the machine."""

    timeout: float = Field(default=3.0, gt=0, le=3600)
    """Of ``programs``: seconds that a program and its tests have. One that takes longer earns nothing."""

    allow_weak_sandbox: tuple[str, ...] = ()
    """Of ``programs``: layers of the sandbox that this machine may lack. Only for programs of a model that you trust."""

    reference: str | None = None
    """Directory or hub name of the model that the penalty of ``kl_coef`` keeps close to."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if (self.kl_coef > 0) != (self.reference is not None):
            raise ValueError(
                f"kl_coef={self.kl_coef} with reference={self.reference}: the penalty needs one, and nothing else reads it"
            )
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutPlan(StepPlan):
    """A step of `GroupRelative`; its batches hold sampled answers."""

    counts: Tensor
    """``[6 + F]`` fp64 over this rank's answers: groups of equal rewards, groups, sum of rewards, answers without an end, tokens,
    answers; then those with each of the flags."""

    flags: tuple[str, ...] = ()
    """Names of what the reward said about answers, in order."""

    seconds: tuple[float, float] = (0.0, 0.0)
    """Wall time of this rank's rollouts, and of their grading."""


class GroupRelative(Scorer):
    """Scores the tokens of sampled answers by their advantage within the group.

    Batches hold prompts: ``input_ids [B, P]``, padded on the left, ``attention_mask [B, P]`` where there is padding, and what
    the reward reads. The draws of an answer follow from the seed of the step and its number there, hence they are the same in
    micro-batches of any size, on any number of ranks and after resuming. All batches must have equally many rows for that.

    Args:
        config: Sampling, normalisation, penalty.
        reward: Grades answers.
        end_ids: Tokens that end an answer; what follows is not trained on.
        pad_id: Fills rows after their end.
        reference: Frozen model that the penalty keeps close to, with the same vocabulary. If it loops, it runs the iterations of
            the step.
        n_tokens: As in `mull.training.objectives.resources.Resources`.

    Raises:
        ValueError: a penalty without a reference, or no token that ends an answer.

    Source:
        GRPO (arXiv:2402.03300). Two differences: the mean is over all generated tokens of the step (DAPO, arXiv:2503.14476)
        and not per answer first, which would make the tokens of long answers count less; and there is one update per sample
        instead of several with a clipped ratio. As in the paper, the gradient goes through k3 itself. On the model's own samples
        its expectation is the gradient of ``KL(reference ‖ model)`` per token, not of ``KL(model ‖ reference)``, which k3
        estimates.
    """

    signed = True

    def __init__(
        self,
        config: GRPOConfig,
        reward: Reward,
        end_ids: Sequence[int],
        pad_id: int,
        reference: MullForCausalLM | None = None,
        n_tokens: int | None = None,
    ) -> None:
        if config.kl_coef > 0 and reference is None:
            raise ValueError(
                f"kl_coef={config.kl_coef} penalises the distance to a reference model, and none was given: give one, or set "
                "kl_coef=0."
            )
        if not end_ids:
            raise ValueError("end_ids is empty: without a token that ends an answer every answer is cut off.")
        super().__init__(self._signed_scores, reference, config)
        self.temperature = config.temperature
        self._reward = reward
        self._end_ids = torch.tensor(list(end_ids))
        self._pad_id = pad_id
        self._n_tokens = n_tokens

    @torch.no_grad()
    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch], iterations: int, seed: int) -> StepPlan:
        """Sample answers, grade them, and make batches to train on.

        Returns:
            Batches of ``input_ids``, ``labels`` (-100 in the prompt and after the end) and ``attention_mask``, each ``[N, T]``,
            and ``advantages [N]``.

        Raises:
            ValueError: prompts that are not padded on the left, too long a row for the model, a reference with another
                vocabulary, or rewards of a wrong shape or value.
        """
        if self.reference is not None:
            check_reference(model, self.reference, self._n_tokens)
        begin = time.perf_counter()
        with evaluating(model):
            drawn = [
                self._drawn(model, batch, iterations, seed, (rank() + number * world_size()) * len(batch["input_ids"]))
                for number, batch in enumerate(batches)
            ]
            synchronize(model.device)
            middle = time.perf_counter()
            answered = [self._graded(prompts, completions) for prompts, completions in drawn]
            end = time.perf_counter()
        return RolloutPlan(
            batches=[batch for batch, _, _ in answered],
            iterations=iterations,
            counts=functools.reduce(torch.add, [count for _, count, _ in answered]),
            flags=answered[0][2],
            seconds=(middle - begin, end - middle),
        )

    def _drawn(
        self, model: MullForCausalLM, batch: Batch, iterations: int, seed: int, first: int
    ) -> tuple[Batch, Tensor]:
        """Prompts, each repeated for its answers, and the answers; `first` is the number of the first prompt in the step."""
        config = self.config
        prompts = {name: entry.repeat_interleave(config.group_size, 0) for name, entry in batch.items()}
        prompts.setdefault("attention_mask", torch.ones_like(prompts["input_ids"]))
        self._check_prompts(model, prompts["attention_mask"])
        numbers = range(first * config.group_size, first * config.group_size + len(prompts["input_ids"]))
        completions = rollouts(
            model,
            prompts["input_ids"],
            prompts["attention_mask"],
            seeds=[mixed_seed(seed, number) >> 1 for number in numbers],  # numpy and torch agree on 63 bits
            end_ids=self._end_ids.tolist(),
            pad_id=self._pad_id,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            iterations=None if model.etd_config is None else iterations,
            draft_length=config.draft_length,
            compiled=config.compile_rounds,
        )
        return prompts, completions

    def _graded(self, prompts: Batch, completions: Tensor) -> tuple[Batch, Tensor, tuple[str, ...]]:
        """A batch to train on, what it counts for `RolloutPlan.counts`, and the names of the flags among that."""
        rewards, flags = self._rewards(completions, prompts)
        advantages = group_advantages(rewards, normalise_std=self.config.normalise_std).flatten()
        ends = torch.isin(completions, self._end_ids.to(completions.device))
        written = ends.cumsum(1) - ends.long() == 0  # up to the first end, itself included
        mask = prompts["attention_mask"]
        ids = torch.cat([prompts["input_ids"], completions], 1)
        labels = torch.cat([torch.full_like(mask, IGNORED), torch.where(written, completions, IGNORED)], 1)
        visible = torch.cat([mask, written.to(mask.dtype)], 1)
        trained = {"input_ids": ids, "labels": labels, "attention_mask": visible, "advantages": advantages}
        names = tuple(sorted(flags))
        flagged = [flags[name].to(rewards.device).double().sum() for name in names]
        return trained, torch.cat([_count(rewards, written, ends), *(each[None] for each in flagged)]), names

    def _check_prompts(self, model: MullForCausalLM, mask: Tensor) -> None:
        if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, -1].all()):
            raise ValueError(
                "A prompt is padded after its tokens, where its answer must begin: pad prompts on the left."
            )
        length = mask.shape[1] + self.config.max_new_tokens
        limit = model.config.get_text_config().max_position_embeddings
        if length > limit:
            raise ValueError(
                f"Prompts of {mask.shape[1]} tokens and max_new_tokens={self.config.max_new_tokens} make rows of {length}, but "
                f"the model has {limit} positions: shorten one of them."
            )

    def _rewards(self, completions: Tensor, prompts: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Rewards by prompt and sample, ``[B, G]``, and the flags of the answers."""
        given = self._reward(completions, prompts)
        rewards, flags = given if isinstance(given, Graded) else (given, {})
        if rewards.shape != completions.shape[:1] or not bool(rewards.isfinite().all()):
            raise ValueError(
                f"The reward gave {rewards} for {len(completions)} answers: it must give one finite number for each."
            )
        return rewards.detach().to(completions.device, torch.float32).view(-1, self.config.group_size), flags

    def evidence(self, model: MullForCausalLM, batch: Batch, hidden: Tensor, plan: StepPlan) -> Evidence:
        """Let the reference run the iterations of the step."""
        evidence = super().evidence(model, batch, hidden, plan)
        if self.reference is None or self.reference.etd_config is None:
            return evidence
        return replace(evidence, reference_iterations=plan.iterations)

    def _signed_scores(self, evidence: Evidence) -> Scored:
        advantages = evidence.batch["advantages"][:, None].expand(evidence.valid.shape)
        if self.config.kl_coef == 0:
            return Scored(scores=advantages)
        delta = (evidence.statistics.loss - evidence.reference_loss).clamp(max=MAX_EXPONENT)
        k3 = torch.where(evidence.valid, torch.expm1(delta) - delta, 0)
        seen = torch.stack([k3.sum(dtype=torch.float64), evidence.valid.sum().double()])
        return Scored(scores=advantages + self.config.kl_coef * torch.expm1(delta), seen=seen)

    def end_step(self, plan: StepPlan, seen: Sequence[Tensor]) -> dict[str, float]:
        """Numbers of the step's answers.

        * ``reward``: mean reward;
        * ``equal_groups``: share of prompts whose answers all have the same reward, and hence teach nothing;
        * ``completion_length``: mean tokens of an answer, its end included;
        * ``truncated``: share of answers without an end;
        * the flags of `Graded`: share of answers that have each;
        * ``rollout_seconds``, ``grading_seconds``: wall time on the slowest rank;
        * ``kl``: mean k3 per token in nats, only with a penalty.
        """
        assert isinstance(plan, RolloutPlan)
        equal, groups, reward, truncated, tokens, answers, *flagged = global_sum(plan.counts).tolist()
        metrics = {"reward": reward / answers, "equal_groups": equal / groups}
        metrics |= {"completion_length": tokens / answers, "truncated": truncated / answers}
        metrics |= {name: count / answers for name, count in zip(plan.flags, flagged, strict=True)}
        sampling, grading = zip(*gather_objects(plan.seconds), strict=True)
        metrics |= {"rollout_seconds": max(sampling), "grading_seconds": max(grading)}
        if self.config.kl_coef > 0:
            divergence, targets = global_sum(functools.reduce(torch.add, seen)).tolist()
            metrics["kl"] = divergence / targets
        return metrics


def _count(rewards: Tensor, written: Tensor, ends: Tensor) -> Tensor:
    equal = rewards.amax(1) == rewards.amin(1)
    counted = [equal.sum(), rewards.shape[0], rewards.sum(), (~ends.any(1)).sum(), written.sum(), rewards.numel()]
    return torch.stack([torch.as_tensor(count, device=rewards.device).double() for count in counted])


def group_relative(config: GRPOConfig, resources: Resources) -> GroupRelative:
    """Build the scorer of ``grpo-wmtp``."""
    if resources.reward is None:
        raise ValueError("grpo-wmtp grades sampled answers with a reward, and none was given.")
    mtp = resources.model.mtp_config
    possible = 0 if mtp is None else Drafter.max_drafts(mtp, config.draft_length)
    if config.draft_length > possible:
        raise ValueError(
            f"grpo.draft_length={config.draft_length}: the model's heads draft {possible} tokens at most. Lower it, or leave it "
            "out."
        )
    end_ids, pad_id, n_tokens = resources.end_ids, resources.pad_id, resources.n_tokens
    return GroupRelative(config, resources.reward, end_ids, pad_id, resources.reference, n_tokens)
