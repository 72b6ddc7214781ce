"""Alignment: each converted layer's mixer learns, by itself, what the teacher's attention returns for the same input.

The student's layers do not run one after the other here. Each gets the states that enter the teacher's layer, so what other
layers still get wrong does not reach it, and no layer waits for another.

Shapes: B batch, T tokens, D model width, L aligned layers, N valid targets.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mull.model.causal_lm import MullForCausalLM
from mull.model.executor import run
from mull.model.families import MIXERS
from mull.model.inputs import LayerInputs
from mull.model.path import Visit
from mull.ops.cross_entropy import accurate
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.distributed import global_sum
from mull.training.objectives.base import (
    Batch,
    LossOutput,
    Objective,
    StepPlan,
    evaluating,
    layout,
    require_step_targets,
)
from mull.training.objectives.resources import ONCE, Resources, Settings, TeacherSource

SILENT = 1e-8
"""Up to this share of the largest power, a layer returns nothing to speak of."""


class AlignConfig(Settings):
    """Which layers are aligned, and what is trained."""

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Numbers of the layers, from 0; without it, those of another kind than the teacher's."""

    trainable: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Patterns of names of parameters to train; without it, the mixers of these layers. The loss reaches nothing but the mixers
    and the norms before them."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={list(self.layers)} names a layer twice")
        return self


class AlignSection(AlignConfig, TeacherSource):
    """Alignment of mixers with the attention of a teacher of the same width."""

    sources = TeacherSource.sources


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignPlan(StepPlan):
    """A step of `Align`."""

    power: Tensor
    """``[L]`` fp64: mean square norm of the teacher's attention outputs."""


class Align(Objective):
    """``mean over layers of Σ_n |student's mixer - teacher's attention|² / power``, a mean over the targets of cross-entropy.

    A layer's power is the mean square norm of the teacher's outputs in the first step of the training, and stays: so the gradient
    of a step does not depend on how it is split into micro-batches. A mixer that returns 0 has a loss of about 1. Where the
    teacher returns nothing, the power is the mean of the other layers': such a layer learns to return nothing, and does not
    outweigh them.

    Args:
        teacher: Frozen, on any device, whole on every rank. Its layers run once each, in evaluation mode.
        layers: Numbers of the aligned layers.
        config: What is trained.

    Source:
        MOHAWK (arXiv:2408.10189), LoLCATs (arXiv:2410.10254) and hybrid distillation (arXiv:2512.20569) align mixers likewise,
        without the division, so large layers dominate their mean.
    """

    def __init__(
        self, teacher: MullForCausalLM, layers: Sequence[int], config: AlignConfig, trains: Sequence[str]
    ) -> None:
        self.layers, self.config, self.trains = tuple(layers), config, tuple(trains)
        self._teacher = teacher
        self._power = torch.zeros(len(self.layers), dtype=torch.float64)  # 0 until a step has measured it

    @property
    def reference(self) -> MullForCausalLM | None:
        """The teacher."""
        return self._teacher

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> AlignPlan:
        """Measure the power of the teacher's outputs, if no step has.

        Raises:
            ValueError: no label of the step is a valid target, or the teacher returns 0 in all layers, or NaN.
        """
        require_step_targets(batches)
        power = self._power if self._power.any() else self._measure(batches)
        return AlignPlan(batches=batches, power=power.to(model.device))

    def _measure(self, batches: Sequence[Batch]) -> Tensor:
        totals = torch.zeros(len(self.layers) + 1, dtype=torch.float64)
        for batch in batches:
            valid = _valid(batch)
            totals[-1] += int(valid.sum())
            for place, (_, _, output) in enumerate(attention_outputs(self._teacher, batch, self.layers)):
                totals[place] += float(_at(output, valid).double().square().sum())
        totals = global_sum(totals)
        power = totals[:-1] / totals[-1]
        if not 0 < power.max() < torch.inf:  # NaN is neither
            raise ValueError(
                f"The attention of the teacher's layers {', '.join(map(str, self.layers))} returns only 0, or what is no number, "
                "and alignment divides by its size: check the teacher's weights."
            )
        silent = power <= SILENT * power.max()
        return power.where(~silent, power[~silent].mean())

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the loss over the valid targets.

        Returns:
            The sum, the number of targets, and by layer the metric ``align/<number>``, its own mean.
        """
        assert isinstance(plan, AlignPlan)
        batch, errors = plan.batches[index], []
        valid, inputs = _valid(batch), None
        n_targets = valid.sum()
        for number, h, wanted in attention_outputs(self._teacher, batch, self.layers):
            h = h.to(model.device, model.dtype)
            inputs = inputs or model.model.layer_inputs(h, **layout(batch))
            output = mixer_output(model, number, h, inputs)
            difference = _at(output, valid) - _at(wanted.to(output), valid)
            errors.append(difference.to(accurate(difference.dtype)).square().sum())
        relative = torch.stack(errors) / plan.power
        metrics = {}
        if n_targets:
            means = (relative.detach() / n_targets).tolist()
            metrics = {f"align/{number}": mean for number, mean in zip(self.layers, means, strict=True)}
        return LossOutput(relative.mean(), n_targets, metrics)

    def end_step(self, plan: StepPlan, seen: Sequence[object]) -> dict[str, float]:
        """Keep the power that the step was divided by."""
        assert isinstance(plan, AlignPlan)
        self._power = plan.power.cpu()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The power by layer."""
        return {"power": self._power}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._power = state["power"]


def _valid(batch: Batch) -> Tensor:
    """``[B, T-1]``: positions that predict a target, those that cross-entropy counts."""
    return targets_of(batch["labels"], label_positions(**layout(batch)), 1)[:, :-1, 0] != IGNORED


def _at(states: Tensor, valid: Tensor) -> Tensor:
    return states[:, :-1][valid.to(states.device)]


def attention_outputs(
    teacher: MullForCausalLM, batch: Batch, layers: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run a teacher's layers once each, without gradient and dropout.

    Yields:
        For each of `layers`, in rising order, its number, the states ``[B, T, D]`` that enter it, and the output of its mixer.
    """
    trunk = teacher.model
    with torch.no_grad():
        h = trunk.embed_tokens(batch["input_ids"].to(teacher.device))
        given: Mapping[str, Tensor | None] = layout(batch)
        options = {name: None if tensor is None else tensor.to(h.device) for name, tensor in given.items()}
        inputs = trunk.layer_inputs(h, **options)
    for number in range(max(layers) + 1):
        with torch.no_grad(), evaluating(trunk.layers[number]):
            output = mixer_output(teacher, number, h, inputs) if number in layers else None
            following = run(trunk.layers, trunk.kinds, [Visit(number, 0)], h, inputs) if number < max(layers) else h
        if output is not None:
            yield number, h, output
        h = following


def mixer_output(model: MullForCausalLM, number: int, h: Tensor, inputs: LayerInputs) -> Tensor:
    """What the mixer of a layer returns where the states ``[B, T, D]`` enter the layer; at padding it may be anything.

    The layer itself is called, with the norms before its mixer, because sharded layers are whole only then.
    """
    layer = model.model.layers[number]
    call = partial(_mixer_output, model, number, inputs=inputs)
    # The layer's own checkpoint would run it again without what `_mixer_output` changes in it.
    if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
        output: Tensor = checkpoint(call, h, use_reentrant=False)
        return output
    return call(h)


def _mixer_output(model: MullForCausalLM, number: int, h: Tensor, inputs: LayerInputs) -> Tensor:
    layer, taken = model.model.layers[number], list[Tensor]()

    def take(_module: nn.Module, _arguments: Any, output: Any) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        stack.callback(_mixer(layer).register_forward_hook(take).remove)
        # First, so that FSDP gathers the weights again for the backward pass of what the layer seems to return.
        stack.callback(layer.register_forward_hook(lambda *_: taken.pop(), prepend=True).remove)
        stack.enter_context(_replaced(layer.mlp, "forward", lambda x, *_, **__: x))  # its result is dropped
        stack.enter_context(_replaced(layer, "gradient_checkpointing", False))
        return run(model.model.layers, model.model.kinds, [Visit(number, 0)], h, inputs)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance; at the end everything is as before."""
    own = vars(module)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before


def _mixer(layer: nn.Module) -> nn.Module:
    return next(getattr(layer, name) for name in MIXERS if hasattr(layer, name))


def align(settings: AlignConfig, resources: Resources) -> Align:
    """Build the objective.

    Raises:
        ValueError: no teacher was given, it has other layers than the model or fewer tokens, no layer differs, or
            `loss.iterations` are given.
    """
    model, teacher = resources.model, resources.reference
    if teacher is None:
        raise ValueError("align compares with the attention of a teacher, and none was given.")
    if resources.iterations != ONCE:
        raise ValueError("align runs every layer once, by itself: leave loss.iterations out.")
    ours, theirs = (of.config.get_text_config() for of in (model, teacher))
    if (ours.hidden_size, ours.num_hidden_layers) != (theirs.hidden_size, theirs.num_hidden_layers):
        raise ValueError(
            f"The teacher has {theirs.num_hidden_layers} layers of width {theirs.hidden_size}, the model "
            f"{ours.num_hidden_layers} of width {ours.hidden_size}: align compares them layer by layer."
        )
    known, wanted = (of.lm_head.out_features for of in (teacher, model))
    if known < min(resources.n_tokens or wanted, wanted):
        raise ValueError(
            f"The teacher has a vocabulary of {known} tokens, the model one of {wanted}: use a teacher with the same tokenizer."
        )
    kinds = list(zip(model.model.kinds, teacher.model.kinds, strict=True))
    layers = settings.layers or tuple(number for number, (own, other) in enumerate(kinds) if own != other)
    if not layers:
        raise ValueError(
            "Every layer of the model is of its teacher's kind, so none is to be aligned: name some (layers)."
        )
    if unknown := [number for number in layers if not 0 <= number < len(kinds)]:
        raise ValueError(f"layers names {unknown[0]}, and the model has the layers 0 to {len(kinds) - 1}.")
    mixers = {id(_mixer(model.model.layers[number])) for number in layers}
    names = [f"{name}.*" for name, module in model.named_modules() if id(module) in mixers]
    return Align(teacher, sorted(layers), settings, settings.trainable or names)
