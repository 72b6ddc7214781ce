"""Layer routing: which layers a token skips, executes or repeats, decided by a router in front of each layer.

A path with room to repeat (`mull.model.path.repeatable`) visits each routed layer twice. SKIP runs neither visit, EXECUTE the
first, REPEAT both. So a route is nothing but tokens that do not run a visit, in training and with every memory.

Shapes: B batch, T tokens of a call, D model width, A actions.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import initialization as init

from mull.layers.routers import EXECUTE, REPEAT, SKIP, LayerRouter, Prompts
from mull.model.configs import ETDConfig, LayerRouterConfig, Stop
from mull.model.path import Visit
from mull.model.policy import Policy
from mull.runtime.distributed import world_size

Attempt = Callable[[int, Tensor], Tensor]
"""From a layer and the states ``[B, T, D]`` before it to those after it, if all tokens ran it."""

_COUNTED: "WeakSet[RoutedParts]" = WeakSet()


class RoutedParts(nn.Module):
    """What a model's routes need besides its layers: the routers, their warm-up, and counts of what they decided.

    Args:
        config: Of the think block.
        width: Model width D.
    """

    def __init__(self, config: ETDConfig, width: int) -> None:
        super().__init__()
        self.warmup_steps = config.router_warmup_steps
        self.layer_routers = nn.ModuleDict()
        router = config.router
        if router is None:
            return
        for layer in config.routed_layers:
            self.layer_routers[str(layer)] = LayerRouter(width, router.hidden_size, router.num_actions)
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("_actions", torch.zeros(3, dtype=torch.long), persistent=False)
        _COUNTED.add(self)

    n_steps: Tensor
    """Optimizer steps that trained the routers."""
    _actions: Tensor

    def start_anew(self) -> None:
        """Begin the warm-up."""
        if self.layer_routers:
            init.zeros_(self.n_steps)
            init.zeros_(self._actions)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also count the steps of a copy."""
        super().__setstate__(state)
        if self.layer_routers:
            _COUNTED.add(self)

    @property
    def warms_up(self) -> bool:
        """Whether routers execute every layer for now."""
        return bool(self.n_steps < self.warmup_steps)

    def end_warm_up(self) -> None:
        """Let routers decide from now on."""
        self.n_steps.clamp_(min=self.warmup_steps)

    def count(self, actions: Tensor) -> None:
        """Add to the statistics."""
        self._actions += actions.flatten().bincount(minlength=3).to(self._actions.device)

    def get_router_stats(self) -> dict[str, int]:
        """How often routers decided what since `reset_stats`: ``skip_count``, ``execute_count`` and ``repeat_count``.

        Routers of a sequence decide once per row, those of tokens once per token, padding left out.
        """
        counts = self._actions.tolist() if self.layer_routers else [0, 0, 0]
        return dict(zip(("skip_count", "execute_count", "repeat_count"), counts, strict=True))

    def reset_stats(self) -> None:
        """Forget what was counted."""
        if self.layer_routers:
            self._actions.zero_()


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    for parts in _COUNTED:
        # Several optimizers may share the routers, for instance Muon and AdamW: one of them has the first parameter.
        first = next((parameter for parameter in parts.parameters() if parameter.requires_grad), None)
        if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
            parts.n_steps += 1


# Every training loop calls its optimizer, and none of them would know that routers have a warm-up.
register_optimizer_step_post_hook(_count_step)


class LayerRouting(Policy):
    """The policy of one call of a model with layer routers.

    Args:
        config: Of the routers.
        parts: The routers.
        stop: What tokens that skip a visit leave behind.
        prompts: For routers of sequences, where the prompts are.
        tokens: ``[B, T]``, False for padding; None without.
        kept: For routers of sequences, what the cache remembers: ``[B]`` actions by visit. Filled by the call that holds the
            prompt. None without a cache.
        attempt: Lets routers learn what an action that was not taken would have given; None where nothing is learned.
        given: ``[B, L]`` actions by layer to take instead.
    """

    def __init__(
        self,
        config: LayerRouterConfig,
        parts: RoutedParts,
        stop: Stop,
        *,
        prompts: Prompts | None = None,
        tokens: Tensor | None = None,
        kept: dict[Visit, Tensor] | None = None,
        attempt: Attempt | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.stop = stop
        self.actions: dict[Visit, Tensor] = {}
        """``[B, T]`` by the first visit of a layer and iteration."""
        self.logits: dict[Visit, Tensor] = {}
        """By the same visits, ``[S, A]`` of routers of sequences, ``[B, T, A]`` of those of tokens. Where actions are given, they
        have no gradient to the states."""
        self._config, self._parts = config, parts
        self._routers: dict[str, Any] = dict(parts.layer_routers.items())
        self._prompts, self._tokens = prompts, tokens
        self._kept = kept
        self._attempt = attempt
        self._given = given
        self._executes = parts.warms_up and given is None
        self._chosen: tuple[Tensor, Tensor | None] | None = None

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens whose action runs this visit."""
        router = self._router(visit)
        if router is None:
            return True
        if self._repeats(visit):
            assert self._chosen is not None, "a layer's first visit comes before its second"
            return self._running(self._chosen[0] == REPEAT)
        self._chosen = self._choose(visit, router, h)
        self.actions[visit] = self._chosen[0]
        return self._running(self._chosen[0] != SKIP)

    def _router(self, visit: Visit) -> LayerRouter | None:
        return self._routers.get(str(visit.layer))

    def _repeats(self, visit: Visit) -> bool:
        return self._config.num_actions > REPEAT and visit.occurrence % 2 == 1

    def _running(self, runs: Tensor) -> Tensor | bool:
        real = runs if self._tokens is None else runs & self._tokens
        if not bool(real.any()):
            return False
        every = runs if self._tokens is None else runs | ~self._tokens
        return True if bool(every.all()) else real

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
        self._parts.count(actions if self._tokens is None or self._prompts is not None else actions[self._tokens])
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
                change = torch.where(runs, change, self._attempt(visit.layer, before) - before)
            if repeats:
                change = change * (actions != SKIP)[..., None]
        assert probabilities is not None, "checked above"
        weight = probabilities[..., REPEAT] if repeats else 1 - probabilities[..., SKIP]
        return after + (weight - weight.detach()).to(after.dtype)[..., None] * change

    def metrics(self) -> dict[str, Any]:
        """``router_actions``: ``[B, T]`` for each decision in the order of the path, as in `mull.layers.routers`."""
        return {"router_actions": list(self.actions.values())}
