"""The gradient of an optimizer step: that of the mean loss over the targets of all micro-batches of all ranks.

Losses are summed and the sum of their gradients is divided by the total weight once, so the gradient does not depend on how
targets fall into micro-batches and ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mull.model.causal_lm import MullForCausalLM
from mull.runtime.arguments import Frozen
from mull.runtime.distributed import gather_objects, world_size
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan
from mull.training.optimization import Precision, gradient_norm


class DistributedConfig(Frozen):
    """How several ranks share the weights. Has no effect with one process."""

    reshard_after_forward: bool = True
    """Free a decoder layer's gathered weights after each visit and gather them again for the next one and for the backward pass.
    ``False`` keeps them until the backward pass: faster, since a layer that is visited k times is gathered once instead of k
    times, but the whole model is in memory."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` gathers the weights in bf16, which halves the traffic, and computes in it. Each rank keeps its shard and the
    optimizer's state in the weights' own type, and gradients are summed over ranks in fp32. ``fp32`` gathers the weights in the
    type they have; ``train.precision`` sets the precision of the computation, as on one device."""


class MicroBatch(NamedTuple):
    """What a micro-batch contributed, in plain numbers that ranks exchange."""

    number: int
    """Number of the batch in the data."""

    loss: float
    """Summed over its targets."""

    weight: float
    """Total weight of its targets."""

    tokens: int
    """Input tokens, padding not counted where an attention mask ``[B, T]`` marks it."""

    metrics: dict[str, float]


class Accumulated(NamedTuple):
    """What `accumulate` leaves besides the gradient."""

    parts: list[MicroBatch]
    """The micro-batches of all ranks, by number."""

    plan: StepPlan
    seen: list[Any]
    """`LossOutput.seen` of this rank's micro-batches."""


class WrongStepError(Exception):
    """Why the gradient of a step must not reach the weights; the same on every rank."""


class Stage(nn.Module):
    """The model and what its objective trains beside it. Every use of their weights is a method of this class.

    Sharded weights are whole only inside these methods.

    Attributes:
        objective: The loss; it may be replaced by one with the same companion.
    """

    def __init__(self, model: MullForCausalLM, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.companion = objective.companion
        self.objective = objective

    def forward(self, plan: StepPlan, index: int) -> LossOutput:
        """Compute the loss of a micro-batch, with what experts of the backbone and token skipping add to it."""
        config = getattr(self.model, "text_config", None)  # any module may be trained with an objective of its own
        if config is None:
            return self.objective.loss(self.model, plan, index)
        balances = getattr(config, "output_router_logits", False)
        collects = self.model.model.router_logits() if balances else nullcontext([])
        with collects as routed, self.model.auxiliary_losses() as terms:
            output = self.objective.loss(self.model, plan, index)
        if routed:
            losses = self.model.router_losses(routed, plan.batches[index].get("attention_mask"))
            for name, (coefficient, term) in losses.items():
                output = _with(output, name, term, coefficient)
        return _with(output, "token_skip_loss", torch.stack(terms).mean()) if terms else output

    def plan_step(self, batches: Sequence[Batch]) -> StepPlan:
        """Let the objective decide about the step."""
        return self.objective.plan_step(self.model, batches)

    def evaluate(self, evaluate: Callable[[MullForCausalLM], Mapping[str, float]]) -> Mapping[str, float]:
        """Call a function with the model."""
        return evaluate(self.model)

    def free(self) -> None:
        """Free gathered weights that are kept for a backward pass, if none will come."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _with(output: LossOutput, name: str, term: Tensor, coefficient: float = 1.0) -> LossOutput:
    """Add a term to a loss. Micro-batches count by their weight, as in the mean loss."""
    total = output.sum + coefficient * term * output.weight
    return output._replace(sum=total, metrics={**output.metrics, name: float(term.detach())})


def make_stage(model: MullForCausalLM, objective: Objective, config: DistributedConfig) -> Stage:
    """The model with its objective; with several ranks sharded, layer by layer, unless an earlier call has done that.

    Raises:
        ValueError: the model was sharded with another companion, or has trained weights of several types.
    """
    if world_size() == 1:
        return Stage(model, objective)
    stage: Stage | None = vars(model).get("_stage")
    if stage is None:
        stage = Stage(model, objective)
        shard(stage, model.model.layers, ["plan_step", "evaluate"], config)
        # Not set as an attribute: the model would become a submodule of its own submodule.
        vars(model)["_stage"] = stage
    elif stage.companion is not objective.companion:
        raise ValueError(
            "The model was sharded over ranks together with the companion of an earlier objective. Give this objective the same "
            "companion, or load the model anew."
        )
    else:
        # FSDP reads the types of the trained weights when it gathers them first; other weights may be trained from now on.
        for unit in stage.modules():
            if isinstance(unit, FSDPModule):
                unit.unshard()
                unit.reshard()
    stage.objective = objective
    return stage


def shard(root: nn.Module, units: Iterable[nn.Module], methods: Sequence[str], config: DistributedConfig) -> None:
    """Share the weights of a module among the ranks, in place (FSDP2), starting from the values of rank 0.

    Afterwards parameters are `DTensor`, sharded along their first dimension. Inside ``forward`` and `methods` of `root` they are
    whole; those of a unit, while the unit runs.

    Args:
        root: Its parameters outside of `units`, including tied ones, are gathered for the whole of a call.
        units: Submodules that are gathered one by one, such as decoder layers. A unit may run several times in a call.
        methods: Names of the methods of `root`, other than ``forward``, that use its parameters.
        config: When units are freed, and the type they are gathered in.

    Raises:
        ValueError: the trained weights have several types.
    """
    parameters = list(root.parameters())
    dtypes = {parameter.dtype for parameter in parameters if parameter.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"The weights to train have the types {', '.join(sorted(map(str, dtypes)))}, but ranks can share weights of "
            "one type only: convert the model, for instance with model.float()."
        )
    for tensor in (*parameters, *root.buffers()):
        distributed.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(parameters[0].device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.param_dtype == "bf16" else None,
        reduce_dtype=torch.promote_types(parameters[0].dtype, torch.float32),
        cast_forward_inputs=False,  # rewards and other inputs that are numbers keep their precision
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(root, method)


def accumulate(stage: Stage, batches: Mapping[int, Batch], precision: Precision) -> Accumulated:
    """Leave the gradient of the summed loss in the parameters; with several ranks, the mean of the ranks' sums.

    `stage` is in training mode; `batches` are this rank's micro-batches by number, on the model's device, equally many on
    every rank.
    """
    device = next(stage.parameters()).device
    # Caching would keep a copy of every layer's gathered weights until the end of the forward pass.
    cached = world_size() == 1
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=cached)
    with torch.no_grad(), autocast:
        plan = stage.plan_step(list(batches.values()))
    parts, seen = [], []
    for index, number in enumerate(batches):
        with autocast:
            output: LossOutput = stage(plan, index)
        if not output.sum.requires_grad:
            raise ValueError(
                "The loss does not depend on any trainable parameter: choose others (train.trainable), or another objective."
            )
        output.sum.backward()
        loss, weight = float(output.sum.detach()), float(output.weight)
        parts.append(MicroBatch(number, loss, weight, _count_tokens(plan.batches[index]), output.metrics))
        seen.append(output.seen)
    everywhere = sorted((part for of_rank in gather_objects(parts) for part in of_rank), key=lambda part: part.number)
    return Accumulated(everywhere, plan, seen)


def _count_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.ndim == 2 else batch["input_ids"].numel()


def total_weight(parts: Sequence[MicroBatch]) -> float:
    """Total weight of the step's targets.

    Raises:
        WrongStepError: the loss of a micro-batch is not finite, or there is nothing to learn from.
    """
    for part in parts:
        if not math.isfinite(part.loss):
            raise WrongStepError(f"the loss of batch {part.number} is {part.loss}")
    weight = sum(part.weight for part in parts)
    if not weight > 0:
        raise WrongStepError(f"{_named(parts)} weigh {weight} together, so there is nothing to learn from")
    return weight


def mean_metrics(parts: Sequence[MicroBatch]) -> dict[str, float]:
    """Metrics averaged over the micro-batches that have them: one without targets has no mean loss."""
    found: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def normalise(parameters: Sequence[nn.Parameter], parts: Sequence[MicroBatch], clip_norm: float | None) -> float:
    """Turn the summed gradient into that of the mean loss, and clip it.

    `parts` are the micro-batches of all ranks, from `accumulate`.

    Returns:
        The norm before clipping, over all ranks' shards.

    Raises:
        WrongStepError: the norm is not finite.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(total_weight(parts) / world_size())
    norm = gradient_norm(parameters)
    if not torch.isfinite(norm):
        raise WrongStepError(f"the norm of the gradient of {_named(parts)} is {float(norm)}")
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(norm)


def _named(parts: Sequence[MicroBatch]) -> str:
    first, last = parts[0].number, parts[-1].number
    return f"batch {first}" if first == last else f"batches {first} to {last}"
