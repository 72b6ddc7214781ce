"""Layer routing: which layers a token skips, executes or repeats, decided by a router in front of each layer.

A path with room to repeat (`mull.model.path.repeatable`) visits each routed layer twice. SKIP runs neither visit, EXECUTE the
first, REPEAT both. So a route is nothing but tokens that do not run a visit, in training and with every memory.

Shapes: B batch, T tokens of a call, D model width, A actions.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mull.layers.routers import EXECUTE, REPEAT, SKIP, LayerRouter, Prompts
from mull.model.configs import ETDConfig, LayerRouterConfig, Stop
from mull.model.depth_router import DepthRouter
from mull.model.experts import ExpertRouting, Experts
from mull.model.inputs import LayerInputs
from mull.model.memory import Decision
from mull.model.path import Visit
from mull.model.policy import NOTHING, Extra, Policy, Together, running
from mull.model.token_skip import METHODS, SkipCall, TokenSkips
from mull.model.warmup import WarmedUp
from mull.runtime.distributed import world_size

Attempt = Callable[[Visit, Tensor, Extra], Tensor]
"""From a visit, the states ``[B, T, D]`` before it and its `Policy.extra` to the states after it, if all tokens ran it."""

Routed = Literal["not", "experts", "routers"]
"""What decides in a decoder: nothing; gates, along a path that was given; layer routers and gates, as far as there are any."""


class RoutedCall(NamedTuple):
    """What decisions need to know about a call."""

    states: Tensor
    """``[B, T, D]``; only their shape counts."""

    inputs: LayerInputs | None
    """What its layers share; None on a cache of fixed size, where a row is one sequence."""

    tokens: Tensor | None
    """``[B, T]``, False for padding; None without."""

    prompt_mask: Tensor | None
    """``[B, T]``, True or 1 for tokens of prompts; None for the first token of each sequence."""

    decisions: dict[Decision, Tensor] | None
    """Those that the cache remembers about rows; empty before the call that holds the prompts. None without a cache."""

    whole: bool = True
    """Nothing precedes the call."""

    def sequences(self) -> Tensor | None:
        """``[B, T]``: number of each token's sequence; None for one in each row, as with a mask of padding."""
        return None if self.tokens is not None or self.inputs is None else self.inputs.sequences(len(self.states))

    def prompts(self, granularity: str, n_windows: int) -> Prompts | None:
        """Where routers of sequences look; None for those of tokens, and if the rows have their decisions."""
        if granularity != "sequence" or self.decisions:
            return None
        return Prompts.of(self.states, self.sequences(), self.tokens, self.prompt_mask, n_windows)


class RoutedParts(nn.Module):
    """What a model's routes need besides its layers: routers of layers and of iterations, token skipping, LoRA experts.

    Args:
        config: Of the think block.
        layers: Decoder layers of the model.
        width: Model width D.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self._config = config
        self.layer_routers = None if config.router is None else LayerRouters(config, config.router, width)
        self.experts = None if config.experts is None else Experts(config, layers, width)
        self.token_skip: TokenSkips | None = None
        if config.token_skip is not None:
            self.token_skip = METHODS[config.token_skip.method](config, layers, width)
        depth, most = config.depth_router, config.max_think_iterations
        self.depth_router = None if depth is None else DepthRouter(width, most, depth.balance_rate)

    def attach(self, layers: nn.ModuleList) -> None:
        """Work on these layers."""
        for part in (self.experts, self.token_skip):
            if part is not None:
                part.attach(layers)

    def auxiliary_losses(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what token skipping adds to the loss of calls in training: of each visit a term, whose mean counts."""
        return nullcontext([]) if self.token_skip is None else self.token_skip.auxiliary_losses()

    def policy(
        self,
        policy: Policy | None,
        call: RoutedCall,
        *,
        attempt: Attempt | None = None,
        given: Tensor | None = None,
        fixed: bool = False,
    ) -> Policy | None:
        """Another policy together with those of routers and experts; None if nothing decides. See `MullModel.with_routing`."""
        config = self._config
        policies = [] if policy is None else [policy]
        stop = config.stop if policy is None else policy.stop
        if self.experts is not None and config.experts is not None:
            prompts = call.prompts(config.experts.granularity, 1)
            policies.append(ExpertRouting(config, self.experts, stop, prompts, call.tokens, call.decisions))
        if self.layer_routers is not None and config.router is not None and not fixed:
            routing = LayerRouting(
                config.router,
                self.layer_routers,
                config.stop,
                prompts=call.prompts(config.router.granularity, config.router.num_windows),
                tokens=call.tokens,
                kept=call.decisions,
                attempt=attempt,
                experts=None if self.experts is None else policies[-1],
                given=given,
            )
            policies.append(routing)
        if self.token_skip is not None:
            skip_call = SkipCall(call.states, call.sequences, call.tokens, call.whole, fixed, policy is not None)
            policies += self.token_skip.policies(stop, skip_call)
        return Together(policies) if len(policies) > 1 else next(iter(policies), None)

    def get_router_stats(self) -> dict[str, Any]:
        """What was decided since `reset_stats`.

        Returns:
            ``skip_count``, ``execute_count`` and ``repeat_count`` of layer routers: those of a sequence decide once per row,
            those of tokens once per token. ``expert_counts``, in a model with LoRA experts: how often each was chosen, once per
            iteration. ``depth_counts``, in a model with a router of iterations: how often 1, 2 and more were chosen. With token
            skipping ``executed_share``, the share of the tokens that ran a layer, by layer; and if ranks decided,
            ``rank_agreement``: for which share of the tokens the rule of use says the same. Padding is left out.
        """
        counts = [0, 0, 0] if self.layer_routers is None else self.layer_routers.counts
        stats: dict[str, Any] = dict(zip(("skip_count", "execute_count", "repeat_count"), counts, strict=True))
        chosen = {"expert_counts": self.experts, "depth_counts": self.depth_router}
        stats |= {name: part.selections for name, part in chosen.items() if part is not None}
        return stats if self.token_skip is None else stats | self.token_skip.stats()

    def reset_stats(self) -> None:
        """Forget what was counted."""
        for part in (self.layer_routers, self.experts, self.depth_router, self.token_skip):
            if part is not None:
                part.reset_stats()

    def update_expert_bias(self, lr: float = 0.001) -> None:
        """Raise the gate's bias of experts with less than the mean load by `lr`, and lower that of the others.

        The load are the tokens of all training passes since the last update, on all ranks, which call this together. Every
        optimizer step updates the bias by itself with ``LoRAExpertConfig.balance_rate``, until this is called for the first time:
        from then on it is the caller's.

        Raises:
            ValueError: the model has no LoRA experts.

        Source:
            Loss-free balancing (arXiv:2408.15664), as in MoDr.
        """
        if self.experts is None:
            raise ValueError("The model has no LoRA experts: load it with etd=ETDConfig(..., use_lora_experts=True).")
        self.experts.update_bias(lr)


class LayerRouters(WarmedUp):
    """The routers in front of the layers. While they warm up, they execute every layer.

    Args:
        config: Of the think block.
        settings: Of the routers.
        width: Model width D.
    """

    def __init__(self, config: ETDConfig, settings: LayerRouterConfig, width: int) -> None:
        super().__init__(config.router_warmup_steps)
        self.by_layer = nn.ModuleDict(
            {
                str(layer): LayerRouter(width, settings.hidden_size, settings.num_actions)
                for layer in config.routed_layers
            }
        )
        self._actions: Tensor | int = 0

    def count(self, actions: Tensor) -> None:
        """Add to the statistics."""
        self._actions = actions.flatten().bincount(minlength=3) + self._actions

    @property
    def counts(self) -> list[int]:
        """Decisions to skip, to execute and to repeat since `reset_stats`."""
        return [0, 0, 0] if isinstance(self._actions, int) else self._actions.tolist()

    def reset_stats(self) -> None:
        """Forget what was counted."""
        self._actions = 0


class LayerRouting(Policy):
    """The policy of one call of a model with layer routers.

    Args:
        config: Of the routers.
        routers: The routers.
        stop: What tokens that skip a visit leave behind.
        prompts: For routers of sequences, where the prompts are.
        tokens: ``[B, T]``, False for padding; None without.
        kept: For routers of sequences, what the cache remembers: ``[B]`` actions by visit. Filled by the call that holds the
            prompt. None without a cache.
        attempt: Lets routers learn what an action that was not taken would have given; None where nothing is learned.
        experts: Their policy, for such attempts; None without experts.
        given: ``[B, L]`` actions by layer to take instead.
    """

    def __init__(
        self,
        config: LayerRouterConfig,
        routers: LayerRouters,
        stop: Stop,
        *,
        prompts: Prompts | None = None,
        tokens: Tensor | None = None,
        kept: dict[Decision, Tensor] | None = None,
        attempt: Attempt | None = None,
        experts: Policy | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.stop = stop
        self.actions: dict[Visit, Tensor] = {}
        """``[B, T]`` by the first visit of a layer and iteration."""
        self.logits: dict[Visit, Tensor] = {}
        """By the same visits, ``[S, A]`` of routers of sequences, ``[B, T, A]`` of those of tokens. Where actions are given, they
        have no gradient to the states."""
        self._config, self._all = config, routers
        self._routers: dict[str, Any] = dict(routers.by_layer.items())
        self._prompts, self._tokens = prompts, tokens
        self._kept = kept
        self._attempt = attempt
        self._experts = experts
        self._given = given
        self._executes = routers.warms_up and given is None
        self._agreed = {} if self._executes or kept is None else one_for_all_rows(kept)
        self._chosen: tuple[Tensor, Tensor | None] | None = None

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens whose action runs this visit."""
        router = self._router(visit)
        if router is None:
            return True
        if self._repeats(visit):
            assert self._chosen is not None, "a layer's first visit comes before its second"
            agreed = self._agreed.get(visit._replace(occurrence=visit.occurrence - 1))
            return running(self._chosen[0] == REPEAT, self._tokens) if agreed is None else agreed == REPEAT
        self._chosen = self._choose(visit, router, h)
        self.actions[visit] = self._chosen[0]
        agreed = self._agreed.get(visit)
        return running(self._chosen[0] != SKIP, self._tokens) if agreed is None else agreed != SKIP

    def _router(self, visit: Visit) -> LayerRouter | None:
        return self._routers.get(str(visit.layer))

    def _repeats(self, visit: Visit) -> bool:
        return self._config.num_actions > REPEAT and visit.occurrence % 2 == 1

    def _choose(self, visit: Visit, router: LayerRouter, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Actions ``[B, T]``, and probabilities ``[B, T, A]`` where routers learn from them."""
        shape = h.shape[:2]
        if self._executes and self._attempt is None:
            return torch.full(shape, EXECUTE, device=h.device), None
        if self._kept is not None and visit in self._kept:
            return self._kept[visit][:, None].expand(shape), None
        if self._prompts is None and self._config.granularity == "sequence":
            # The cache's first tokens came while routers warmed up.
            return torch.full(shape, EXECUTE, device=h.device), None
        h = h if self._given is None else h.detach()
        logits = router(h) if self._prompts is None else self._prompts.logits(router, h)
        self.logits[visit] = logits
        learns = self._attempt is not None and logits.requires_grad
        scores = logits / self._config.temperature
        if learns and self._config.use_gumbel:
            scores = (logits - torch.empty_like(logits).exponential_().log()) / self._config.temperature
        # During the warm-up routers learn what the other actions would have given.
        actions = torch.full_like(scores[..., 0], EXECUTE, dtype=torch.long) if self._executes else scores.argmax(-1)
        self._all.count(actions if self._tokens is None or self._prompts is not None else actions[self._tokens])
        probabilities = scores.softmax(-1) if learns else None
        if self._prompts is not None:
            if self._kept is not None:
                self._kept[visit] = actions
            actions = actions[self._prompts.sequences]
            probabilities = None if probabilities is None else probabilities[self._prompts.sequences]
        if self._given is not None:
            actions = self._given[:, visit.layer, None].expand(shape)
        return actions, probabilities

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The same states, with a gradient to the router.

        The layer's update counts with the probability that it runs, straight through: in the value that is 1 or 0, in the
        gradient its derivative is that of the probability. For tokens that do not run, the update is what the layer would have
        made of all tokens' states. A token that skips learns nothing about repeating.
        """
        if self._chosen is None or self._chosen[1] is None or self._router(visit) is None:
            return after
        assert self._attempt is not None, "probabilities are kept for learning"
        actions, probabilities = self._chosen
        repeats = self._repeats(visit)
        runs = (actions == REPEAT if repeats else actions != SKIP)[..., None]
        with torch.no_grad():
            change = after - before
            if world_size() > 1 or not bool(runs.all()):  # ranks gather a sharded layer's weights together
                extra = NOTHING if self._experts is None else self._experts.extra(visit)
                change = torch.where(runs, change, self._attempt(visit, before, extra) - before)
            if repeats:
                change = change * (actions != SKIP)[..., None]
        assert probabilities is not None, "checked above"
        weight = probabilities[..., REPEAT] if repeats else 1 - probabilities[..., SKIP]
        return after + (weight - weight.detach()).to(after.dtype)[..., None] * change

    def metrics(self) -> dict[str, Any]:
        """``router_actions``: ``[B, T]`` for each decision in the order of the path, as in `mull.layers.routers`."""
        return {"router_actions": list(self.actions.values())}


def one_for_all_rows(kept: Mapping[Decision, Tensor]) -> dict[Decision, int]:
    """The decisions ``[B]`` in which all rows agree. Values are read once per call, not at every layer."""
    if not kept or torch.compiler.is_compiling():
        return {}
    low, high = torch.stack(list(kept.values())).aminmax(dim=1)
    return {about: first for about, first, last in zip(kept, low.tolist(), high.tolist(), strict=True) if first == last}
