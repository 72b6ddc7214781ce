"""Distillation: the student learns the teacher's predictions, and the data's own tokens beside them.

Shapes: B batch, T tokens, D model width, N valid targets.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from mull.model.causal_lm import MullForCausalLM
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.divergence import Kind, Predictor, TopK, divergence
from mull.ops.targets import IGNORED, label_positions, require_targets, targets_of
from mull.retrofit.hybrid import CrossArchTransferConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.arguments import require, require_count, require_ids
from mull.runtime.distributed import same_everywhere
from mull.training.objectives.base import (
    Batch,
    LossOutput,
    Objective,
    StepPlan,
    batch_states,
    evaluating,
    layout,
    require_step_targets,
)
from mull.training.objectives.evidence import check_reference
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import ONCE, Resources, Settings, TeacherSource
from mull.training.objectives.teacher_cache import TeacherCache


class DistillConfig(Settings):
    """What a student learns from its teacher, and how much."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the divergence from the teacher; the cross-entropy of the data's tokens has ``1 - alpha``."""

    temperature: float = Field(default=2.0, ge=0.01, le=100)
    """T: divides the logits of both models in the divergence, which is multiplied by T²."""

    divergence: Kind = "forward"
    """``forward``: KL(teacher ‖ student), so the student covers all that the teacher does; ``reverse``: KL(student ‖ teacher), so
    it keeps to what the teacher does most; ``jsd``: between the two, bounded."""

    mixture: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that ``jsd`` compares both with; not read by the others."""


class DistillSection(DistillConfig, TeacherSource):
    """Distillation from a teacher with the model's tokenizer."""

    sources = TeacherSource.sources | {"cache"}

    cache: str | None = None
    """Folder for the teacher's predictions. All rows are recorded before the training, and the training needs no teacher; a run
    that finds them complete does not load it. Needs `top_k`."""

    top_k: int | None = Field(default=None, ge=1)
    """Tokens that `cache` keeps of each prediction; one bucket holds the rest. A record takes ``8 · top_k + 4`` bytes."""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if (self.cache is None) != (self.top_k is None):
            raise ValueError(f"cache={self.cache!r} with top_k={self.top_k}: give both, or neither")
        return self


class Losses(NamedTuple):
    """What distillation adds up, over the valid targets of a micro-batch."""

    divergence: Tensor
    """Times T², in nats."""

    cross_entropy: Tensor
    n_targets: Tensor


class Distill(Objective):
    """``alpha · T² · D(teacher, student) + (1 - alpha) · cross-entropy``, a mean over the targets of cross-entropy.

    Both are about the last iteration's prediction by the main head. Extra heads are not trained. The teacher runs the iterations
    of its own configuration.

    Args:
        teacher: Frozen, on any device, whole on every rank; it runs in evaluation mode. Or its `TeacherCache`; batches then have
            ``row_numbers [B]``, as those of `mull.data.sampler.ShuffledBatches` do.
        iterations: Of the student.
        config: Weights, temperature and divergence.
        n_tokens: As in `Resources`.

    Raises:
        TypeError: `n_tokens` is no whole number.
        ValueError: the predictions were recorded at another temperature, or `n_tokens` is less than 1.

    Source:
        Hinton et al. (arXiv:1503.02531). Many implementations average over rows instead of tokens (``batchmean``), so their loss
        grows with the length, and some leave padding in.
    """

    def __init__(
        self,
        teacher: MullForCausalLM | TeacherCache,
        iterations: IterationSampling,
        config: DistillConfig,
        n_tokens: int | None = None,
    ) -> None:
        if isinstance(teacher, TeacherCache) and teacher.identity.temperature != config.temperature:
            raise ValueError(
                f"The teacher's predictions in {teacher.folder} were recorded at temperature={teacher.identity.temperature}, and "
                f"distillation has temperature={config.temperature}: give the former, or record them again in another folder."
            )
        if n_tokens is not None:
            require_count("n_tokens", n_tokens, 1)
        self.iterations, self.config = iterations, config
        self.recorded = asdict(teacher.identity) if isinstance(teacher, TeacherCache) else None
        self._teacher, self._n_tokens = teacher, n_tokens

    @property
    def predictions(self) -> TeacherCache | None:
        """What the teacher predicted, if that is recorded."""
        return self._teacher if isinstance(self._teacher, TeacherCache) else None

    @property
    def reference(self) -> MullForCausalLM | None:
        """The teacher, unless its predictions are recorded."""
        return None if isinstance(self._teacher, TeacherCache) else self._teacher

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Draw the iterations.

        Raises:
            ValueError: no label of the step is a valid target.
        """
        require_step_targets(batches)
        iterations = same_everywhere(self.iterations.sample())
        depths = self.iterations.depths([batch["input_ids"].shape for batch in batches])
        return StepPlan(batches=batches, iterations=iterations, depths=depths)

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the loss over the valid targets.

        Returns:
            The sum, the number of targets, and the metrics ``divergence`` (times T²) and ``cross_entropy``, in nats per target,
            and ``iterations``.
        """
        batch, iterations = plan.batches[index], plan.iterations
        hidden = batch_states(model, batch, iterations, self.iterations.backprop(iterations), plan.depths_of(index))
        found = self.losses(model, batch, hidden)
        metrics = {"iterations": float(iterations)}
        if found.n_targets:
            metrics["divergence"] = float(found.divergence.detach() / found.n_targets)
            metrics["cross_entropy"] = float(found.cross_entropy.detach() / found.n_targets)
        return LossOutput(self.mixed(found), found.n_targets, metrics)

    def losses(self, model: MullForCausalLM, batch: Batch, hidden: Tensor) -> Losses:
        """Those of a micro-batch where the student's final-normed states are `hidden` ``[B, T, D]``.

        A part that has no weight in the loss carries no gradient.
        """
        targets = targets_of(batch["labels"], label_positions(**layout(batch)), 1)[:, :-1, 0]
        valid = targets != IGNORED  # (B, T-1)
        rows, weight, config = hidden[:, :-1][valid], model.unembedding(), self.config
        differentiable = torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiable and config.alpha > 0):
            apart, _ = divergence(
                rows,
                weight,
                self._predictions(batch, valid, min(self._n_tokens or len(weight), len(weight))),
                kind=config.divergence,
                temperature=config.temperature,
                mixture=config.mixture,
                n_tokens=self._n_tokens,
            )
        with torch.set_grad_enabled(differentiable and config.alpha < 1):
            ones = torch.ones(len(rows), device=rows.device)
            own, _ = weighted_cross_entropy(rows, weight, targets[valid], ones)
        return Losses(apart, own, valid.sum())

    def mixed(self, losses: Losses) -> Tensor:
        """The loss, summed over the targets."""
        alpha = self.config.alpha
        if alpha in (0, 1):
            return losses.divergence if alpha else losses.cross_entropy
        return alpha * losses.divergence + (1 - alpha) * losses.cross_entropy

    def _predictions(self, batch: Batch, valid: Tensor, n_tokens: int) -> Predictor | TopK:
        """What the teacher predicts of the first `n_tokens` at the positions `valid` ``[B, T-1]``."""
        if isinstance(self._teacher, TeacherCache):
            return self._recorded(self._teacher, batch, valid, n_tokens)
        teacher = self._teacher
        with torch.no_grad(), evaluating(teacher):
            hidden = batch_states(teacher, {name: tensor.to(teacher.device) for name, tensor in batch.items()})
        return Predictor(hidden[:, :-1][valid.to(hidden.device)], teacher.unembedding())

    def _recorded(self, cache: TeacherCache, batch: Batch, valid: Tensor, n_tokens: int) -> TopK:
        of = cache.identity
        if "row_numbers" not in batch:
            raise ValueError(
                "The teacher's predictions are found by row_numbers, and this batch has none: take batches of "
                "ShuffledBatches(..., numbered=True)."
            )
        shape, numbers = tuple(batch["input_ids"].shape), batch["row_numbers"]
        if shape != (len(numbers), of.length):
            raise ValueError(
                f"input_ids has shape {shape}, and the records of {len(numbers)} rows in {cache.folder} have {of.length} tokens "
                "each: give whole rows of the data that was recorded."
            )
        if of.n_tokens != n_tokens:
            raise ValueError(
                f"The records in {cache.folder} are about {of.n_tokens} tokens of the vocabulary, and {n_tokens} are compared: "
                f"give n_tokens={of.n_tokens}, or record again in another folder."
            )
        places = valid.cpu()
        return TopK(*(tensor[:, :-1][places] for tensor in cache.rows(numbers)))


def distill(settings: DistillConfig, resources: Resources) -> Distill:
    """Build the objective.

    Raises:
        ValueError: neither a teacher nor its predictions were given, or it has another vocabulary.
    """
    teacher = resources.reference if resources.predictions is None else resources.predictions
    if teacher is None:
        raise ValueError("distill learns from a teacher, and none was given.")
    n_tokens = resources.n_tokens
    if isinstance(teacher, MullForCausalLM):
        check_reference(resources.model, teacher, n_tokens)
    return Distill(teacher, resources.iterations, settings, n_tokens)


class DistillationTrainer:
    """Distillation for a training loop of your own; `mull.training.loop.train` does the same with the objective ``distill``.

    Args:
        teacher: A model of mull or of transformers. It runs in evaluation mode, whatever its mode is, and gets no gradient.
        student: A model of mull or of transformers.
        config: Alpha, temperature and divergence; of the configuration of a conversion, alpha and temperature are read.
        n_tokens: Tokens of the tokenizer that both share; their vocabularies may be padded to different sizes then.

    Raises:
        TypeError: an argument of another type.
        ValueError: teacher and student are one model, the vocabularies differ or lack some of `n_tokens`, or as in
            `mull.retrofit.wrap.wrap_transformer_with_etd`.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        config: DistillConfig | CrossArchTransferConfig | None = None,
        n_tokens: int | None = None,
    ) -> None:
        if isinstance(config, CrossArchTransferConfig):
            config = DistillConfig(temperature=config.distillation_temperature, alpha=config.distillation_alpha)
        if teacher is student:
            raise ValueError(
                "Teacher and student are one model, which would follow itself: give a copy (copy.deepcopy)."
            )
        # The mode of layers that both have is the student's.
        self.student, self.teacher = _wrapped("student", student), _wrapped("teacher", teacher)
        check_reference(self.student, self.teacher, n_tokens)
        if n_tokens is not None:
            require_count("n_tokens", n_tokens, 1, self._n_known)
        self._objective = Distill(self.teacher, ONCE, config or DistillConfig(), n_tokens)

    @property
    def _n_known(self) -> int:
        """Tokens that both have."""
        return min(self.student.lm_head.out_features, self.teacher.lm_head.out_features)

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch, means over the valid targets.

        Args:
            input_ids: ``[B, T]``.
            labels: ``[B, T]``, unshifted, -100 ignored.
            attention_mask: ``[B, T]`` with 0 at padding.
            position_ids: ``[B, T]``; a restart begins a document.

        Returns:
            ``loss``; and detached ``kd_loss``, the divergence times T², and ``task_loss``, the cross-entropy, both before their
            weights.

        Raises:
            TypeError: an argument of another type.
            ValueError: tokens or labels that are none of the vocabulary or have another shape, or no label is a valid target.
        """
        require_ids("input_ids", input_ids)
        if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self._n_known:
            raise ValueError(
                f"input_ids has {int(input_ids.min())} to {int(input_ids.max())}: give token numbers from 0 to "
                f"{self._n_known - 1}, which teacher and student know."
            )
        checked = self.student.checked_labels("labels", labels, input_ids.shape)
        require("labels", checked, Tensor, "a tensor [rows, tokens] of token numbers")
        assert checked is not None
        given = {"input_ids": input_ids, "labels": checked}
        optional = {"attention_mask": attention_mask, "position_ids": position_ids}
        batch = given | {name: tensor for name, tensor in optional.items() if tensor is not None}
        found = self._objective.losses(self.student, batch, batch_states(self.student, batch))
        require_targets(found.n_targets, labels)
        return {
            "loss": self._objective.mixed(found) / found.n_targets,
            "kd_loss": found.divergence.detach() / found.n_targets,
            "task_loss": found.cross_entropy.detach() / found.n_targets,
        }


def _wrapped(name: str, model: Any) -> MullForCausalLM:
    """The model with a forward pass that keeps documents and padding apart; the weights are shared."""
    require(name, model, PreTrainedModel, "a causal language model of transformers, or of mull")
    return model if isinstance(model, MullForCausalLM) else wrap_transformer_with_etd(model, None)
