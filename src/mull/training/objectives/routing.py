"""Routing: teach layer routers the routes that a search found, on a frozen model.

The labelled actions run, so each router sees the states that the right route gives, and its logits are compared with the label.
Nothing but the routers learns, and no layer is tried in vain.

Shapes: B batch, T tokens, L layers, S sequences, A actions.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from mull.layers.routers import EXECUTE, REPEAT
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig
from mull.model.executor import run
from mull.model.inputs import new_tokens
from mull.model.path import Visit
from mull.model.policy import Together
from mull.model.routing import LayerRouters, LayerRouting
from mull.ops.targets import IGNORED
from mull.runtime.distributed import same_everywhere
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources, Settings


class RoutingConfig(Settings):
    """The loss of layer routers that learn from labels."""

    focal_gamma: float = Field(default=2.0, ge=0, le=100)
    """Exponent of ``1 - p``: how little decisions count that are already right. 0 is cross-entropy."""

    balance: float = Field(default=0.9999, ge=0, lt=1)
    """b of `class_weights`; 0 weighs all actions alike. Dr.LLM has 0.999, which does next to nothing on its own labels."""


class RoutingSection(RoutingConfig):
    """Training of layer routers on the labels of ``mull routes``; the rest of the model stays as it is."""

    sources = frozenset({"held_out_share"})

    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the questions of `data.paths` that is not trained on, but evaluated; drawn by ``train.seed``."""


class Routing(Objective):
    """Focal loss of the routers' decisions along the labelled routes, a mean over decisions for each row.

    ``L = -(1/L) Σ_l α_{y_l} (1 - p_{l,y_l})^γ log p_{l,y_l}``, with the `class_weights` α. Routers of tokens take the mean over a
    row's tokens, which all have its label; with several iterations, each one has it. The first step ends the routers' warm-up,
    since labels need none.

    Batches have ``route_labels [B, L]``, the action of each layer, and one sequence in each row.

    Args:
        routers: Trained in place.
        iterations: Of a step.
        config: The loss.
        weights: α, by action.

    Raises:
        ValueError: `iterations` truncates back-propagation or draws per token.

    Source:
        Dr.LLM (arXiv:2510.12773), section 2.3, which averages over all of a model's layers.
    """

    trains = ("model.etd.layer_routers.*",)

    def __init__(
        self, routers: LayerRouters, iterations: IterationSampling, config: RoutingConfig, weights: Sequence[float]
    ) -> None:
        if iterations.per == "token" or iterations.backprop_iterations is not None:
            raise ValueError(
                "routing labels whole rows and back-propagates through no layer: leave per='token' and backprop_iterations out "
                "of loss.iterations."
            )
        self.iterations, self.config = iterations, config
        self._routers, self._weights = routers, tuple(weights)

    def plan_step(self, model: MullForCausalLM, batches: Sequence[Batch]) -> StepPlan:
        """Draw the number of iterations.

        Raises:
            ValueError: a batch has no labels of routes.
        """
        if any("route_labels" not in batch for batch in batches):
            raise ValueError("routing learns from route_labels, and this batch has none: use data of format routes.")
        return StepPlan(batches=batches, iterations=same_everywhere(self.iterations.sample()))

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the loss over the rows.

        Returns:
            The sum, the number of rows, and the metric ``accuracy``: share of right decisions, along the labelled route.
        """
        batch = plan.batches[index]
        losses, right = [], []
        for visit, logits in router_logits(model, batch, plan.iterations).items():
            label = batch["route_labels"][:, visit.layer]
            labels = label if logits.ndim == 2 else label[:, None].expand(logits.shape[:2])
            losses.append(_by_row(focal_loss(logits, labels, self._weights, self.config.focal_gamma), batch))
            right.append(_by_row((logits.argmax(-1) == labels).to(logits.dtype), batch))
        total = torch.stack(losses).mean(0).sum()
        n_rows = torch.tensor(len(batch["route_labels"]), device=total.device)
        return LossOutput(total, n_rows, {"accuracy": float(torch.stack(right).mean())})

    def end_step(self, plan: StepPlan, seen: Sequence[object]) -> dict[str, float]:
        """End the warm-up."""
        self._routers.end_warm_up()
        return {}


def router_logits(model: MullForCausalLM, batch: Batch, iterations: int = 1) -> Mapping[Visit, Tensor]:
    """Logits of every decision while the labelled actions run, by the first visit of a layer and iteration.

    ``[B, A]`` of routers of sequences, ``[B, T, A]`` of those of tokens. They have a gradient to the routers and to nothing else.
    """
    trunk, labels, mask = model.model, batch["labels"], batch.get("attention_mask")
    ids = batch["input_ids"]
    config = None if trunk.etd_config is None else trunk.etd_config.router
    if config is not None and config.granularity == "sequence":
        # These look at the prompts, and no token looks at later ones.
        labelled = labels != IGNORED
        stop = 1 + int(labelled.int().argmax(1).where(labelled.any(1), ids.shape[1] - 1).max())
        ids, labels, mask = ids[:, :stop], labels[:, :stop], None if mask is None else mask[:, :stop]
    h = trunk.embed_tokens(ids)
    inputs = trunk.layer_inputs(h, mask)
    policy = trunk.with_routing(
        None, h, inputs, new_tokens(mask, h), labels == IGNORED, given=batch["route_labels"].to(h.device)
    )
    policies = policy.policies if isinstance(policy, Together) else [policy]
    [routing] = [each for each in policies if isinstance(each, LayerRouting)]
    run(trunk.layers, trunk.kinds, trunk.path(iterations), h, inputs, policy=policy)
    return routing.logits


def _by_row(values: Tensor, batch: Batch) -> Tensor:
    """Values of rows ``[B]``, or the means ``[B]`` of those of a row's tokens ``[B, T]``."""
    if values.ndim == 1:
        return values
    real = batch.get("attention_mask", torch.ones_like(values))
    return (values * real).sum(1) / real.sum(1)


def focal_loss(logits: Tensor, labels: Tensor, weights: Sequence[float], gamma: float) -> Tensor:
    """``-α_y (1 - p_y)^γ log p_y`` of logits ``[..., A]`` for labels ``[...]``.

    Source:
        Focal loss (arXiv:1708.02002).
    """
    log_p = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    # Not 0, where a power below 1 has no gradient.
    wrong = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -torch.tensor(weights, dtype=log_p.dtype, device=log_p.device)[labels] * wrong**gamma * log_p


def class_weights(counts: Sequence[int], balance: float) -> list[float]:
    """Weights of classes by the effective number of their labels: ``α_c ∝ (1 - b) / (1 - b^n_c)``, 1 on average over classes.

    Classes without a label have the weight 0 and are left out of the average.

    The effective number ``(1 - b^n) / (1 - b)`` counts labels up to about ``1 / (1 - b)``. Dr.LLM's ``b = 0.999`` stops at 1000,
    and its own labels have more of every class, so all classes are weighed almost alike:

    ========  ============  =================  ===============
    b         skip (4399)   execute (120,956)  repeat (1457)
    ========  ============  =================  ===============
    0.999     0.916         0.905              1.179
    0.9999    0.75          0.27               1.98
    0.99999   0.74          0.05               2.21
    ========  ============  =================  ===============

    Args:
        counts: Labels of each class, n.
        balance: b, from 0 to below 1.

    Source:
        Class-balanced loss (arXiv:1901.05555), which advises ``b = 1 - 1/N`` for N labels.
    """
    found = [(1 - balance) / -math.expm1(n * math.log(balance)) if balance and n else float(n > 0) for n in counts]
    return [weight * sum(n > 0 for n in counts) / sum(found) for weight in found]


def routing(settings: RoutingConfig, resources: Resources) -> Routing:
    """Build the objective.

    Raises:
        ValueError: the model has no layer routers, or could not take the labelled routes.
    """
    model, labels = resources.model, resources.route_labels
    etd, routers = model.etd_config, None if model.etd is None else model.etd.layer_routers
    if etd is None or etd.router is None or routers is None:
        raise ValueError(
            "train.algo=routing trains layer routers, and the model has none: give model.etd the entry layer_router: {}."
        )
    if labels is None:
        raise ValueError("routing balances its loss by the labels of the training data: give Resources route_labels.")
    check_route_labels(labels, etd)
    counts = labels[:, etd.routed_layers.start : etd.routed_layers.stop].flatten().bincount(minlength=3).tolist()
    weights = class_weights(counts[: etd.router.num_actions], settings.balance)
    return Routing(routers, resources.iterations, settings, weights)


def check_route_labels(labels: Tensor, etd: ETDConfig) -> None:
    """Refuse labels ``[N, L]`` that the routers of a model cannot follow.

    Raises:
        ValueError: another number of layers, an action for a layer without a router, or one that routers do not have.
    """
    n_layers, router = etd.n_layers, etd.router
    assert router is not None, "a model with routers"
    if labels.shape[1] != n_layers:
        raise ValueError(
            f"The labels are routes through {labels.shape[1]} layers, and the model has {n_layers}: label questions with this "
            "model (mull routes)."
        )
    fixed = [layer for layer in range(n_layers) if layer not in etd.routed_layers]
    if moved := int((labels[:, fixed] != EXECUTE).any(1).sum()):
        raise ValueError(
            f"{moved} of {len(labels)} labels skip or repeat layers that have no router: give the model layer_router: "
            "{scope: all}, or search with --scope think."
        )
    if router.num_actions <= REPEAT and (repeats := int((labels == REPEAT).any(1).sum())):
        raise ValueError(
            f"{repeats} of {len(labels)} labels repeat a layer, and routers with num_actions=2 cannot: give layer_router "
            "num_actions: 3."
        )
