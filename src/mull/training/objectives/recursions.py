"""Mixture-of-recursions: train a model whose router gives each token its iterations (the halting rule ``router``).

Shapes: B batch, T tokens, k most iterations of the model.
"""

from pydantic import Field

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.model.inputs import new_tokens
from mull.training.objectives.base import LossOutput, StepPlan, batch_states
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Resources, Settings


class RecursionsConfig(Settings):
    """What is added to the loss of the next token."""

    z_loss_weight: float = Field(default=1e-3, ge=0)
    """Weight of the router's z-loss: the squared logarithm of the sum of its exponentials, a mean over tokens. It keeps logits
    small."""


class Recursions(NextToken):
    """Next-token prediction with the stops that the router decides, and its z-loss.

    The router gets its gradient by `mull.model.depth_router.DepthRouter.weight`; the load of depths is kept even by its bias, at
    each optimizer step.

    Args:
        iterations: Iterations of a step; at least 2 have to be possible.
        config: The z-loss.
        halting: The model's rule.

    Raises:
        ValueError: `iterations` draws per token, or has a maximum of 1.

    Source:
        Mixture-of-Recursions (arXiv:2507.10524), token choice; z-loss from ST-MoE (arXiv:2202.08906).
    """

    def __init__(self, iterations: IterationSampling, config: RecursionsConfig, halting: HaltingConfig) -> None:
        if iterations.per == "token" or iterations.maximum < 2:
            raise ValueError(
                "mixture-of-recursions lets the router give tokens their iterations: give loss.iterations a maximum of at least "
                "2, without per='token'."
            )
        super().__init__(iterations)
        self.config = config
        self.halting = halting

    def loss(self, model: MullForCausalLM, plan: StepPlan, index: int) -> LossOutput:
        """Sum the cross-entropy over the valid targets, and add the z-loss in proportion to their number.

        Returns:
            As `NextToken.loss`, with the metrics ``mean_iterations`` of a token and ``router_z_loss``.
        """
        batch, most = plan.batches[index], plan.iterations
        tokens = new_tokens(batch.get("attention_mask"), batch["input_ids"])
        policy = model.model.halting(self.halting, most, tokens, model.lm_head)
        assert policy is not None, "a rule was given"
        hidden = batch_states(model, batch, most, self.iterations.backprop(most), policy=policy)
        output = self.loss_of(model, batch, hidden, most)
        assert policy.depth is not None, "the pass has ended"
        real = slice(None) if tokens is None else tokens
        metrics = {**output.metrics, "mean_iterations": float(policy.depth[real].double().mean())}
        total = output.sum
        if policy.router_logits is not None:  # the pass trains
            z_loss = policy.router_logits[real].logsumexp(-1).square().mean()
            metrics["router_z_loss"] = float(z_loss.detach())
            total = total + self.config.z_loss_weight * z_loss * output.weight
        return output._replace(sum=total, metrics=metrics)


def recursions(settings: RecursionsConfig, resources: Resources) -> Recursions:
    """Build the objective.

    Raises:
        ValueError: the model has no router of iterations.
    """
    config = resources.model.etd_config
    if config is None or config.depth_router is None:
        raise ValueError(
            "train.algo=mixture-of-recursions trains a router of iterations, and the model has none: give model.etd the entry "
            "halting: {rule: router}."
        )
    return Recursions(resources.iterations, settings, config.depth_router.model_copy(update={"stop": config.stop}))
