"""Halting: after which think iteration a token is done.

A rule is asked after every iteration but the last, about each token that still thinks. It looks at that token's own states and at
nothing else, so a decision depends neither on later tokens, nor on other rows, nor on how the tokens were divided into calls.

Shapes: B batch, T tokens of a call, N tokens that still think, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mull.model.configs import HaltingConfig, Stop
from mull.model.depth_router import DepthRouter
from mull.model.path import Visit
from mull.model.policy import Policy
from mull.ops.cross_entropy import accurate
from mull.runtime.arguments import nearest

ENTRY_POINTS = "mull.halting"
"""Group of entry points by which another package adds a rule: a function from a `HaltingConfig` to a `Rule`."""

Readout = Callable[[Tensor], Tensor]
"""From think states ``[N, D]`` to logits ``[N, V]``: the final norm and the unembedding."""


class Evidence:
    """What a rule may look at, after an iteration.

    Args:
        iteration: Its number, from 1.
        state: ``[N, D]``: states after it.
        before: ``[N, D]``: states before it.
        kept: What the rule kept of these tokens when it was asked before; it may keep more, ``[N, ...]`` by name.
        readout: Early decoding; None where no unembedding is at hand.
        exit_head: Gives ``[N, 1]`` from states, for ``learned``; None without.
        choose_depth: Gives the iterations ``[N]`` from states, for ``router``; None without.
    """

    def __init__(
        self,
        iteration: int,
        state: Tensor,
        before: Tensor,
        kept: dict[str, Tensor],
        readout: Readout | None,
        exit_head: nn.Module | None,
        choose_depth: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.iteration = iteration
        self.state = state
        self.before = before
        self.kept = kept
        self.exit_head = exit_head
        self.choose_depth = choose_depth
        self.n_readouts = 0
        """Tokens that were decoded early."""
        self._readout = readout

    def log_probabilities(self) -> Tensor:
        """``[N, V]``, at least in fp32: what the model would predict if it stopped here. It costs a pass of the unembedding.

        Raises:
            ValueError: the model has no unembedding.
        """
        if self._readout is None:
            raise ValueError(
                "This halting rule reads the unembedding, which the bare MullModel lacks: load MullForCausalLM, or choose the "
                "rule 'state'."
            )
        self.n_readouts += len(self.state)
        return accurately(self._readout(self.state)).log_softmax(-1)


def accurately(x: Tensor) -> Tensor:
    """The same in fp32, or in fp64 if it was."""
    return x.to(accurate(x.dtype))


class Rule(Protocol):
    """Decides which tokens are done."""

    def __call__(self, evidence: Evidence) -> Tensor:
        """``[N]``, True for tokens that stop."""


def fixed(_config: HaltingConfig) -> Rule:
    """No token stops early."""
    return lambda evidence: torch.zeros(len(evidence.state), dtype=torch.bool, device=evidence.state.device)


def state(config: HaltingConfig) -> Rule:
    """The iteration hardly turned the state: its cosine with the one before is at least the threshold."""
    return lambda evidence: (
        F.cosine_similarity(accurately(evidence.state), accurately(evidence.before), dim=-1) >= config.limit
    )


def confidence(config: HaltingConfig) -> Rule:
    """The most probable token has at least this probability (CALM, arXiv:2207.07061, softmax response).

    CALM takes the difference of the two largest probabilities. A model whose iterations were each taught a step of a procedure
    may be confident about an intermediate result, and stop too early.
    """
    return lambda evidence: evidence.log_probabilities().amax(-1).exp() >= config.limit


def kl(config: HaltingConfig) -> Rule:
    """The iteration hardly changed the prediction: its divergence from the one before is at most the threshold, in nats.

    Source:
        Huginn (arXiv:2502.05171), whose code stops at 1e-3. A first iteration has no prediction before it, so no token stops
        after it.
    """

    def rule(evidence: Evidence) -> Tensor:
        now = evidence.log_probabilities()
        before = evidence.kept.get("log_probabilities", torch.full_like(now, -torch.inf))
        evidence.kept["log_probabilities"] = now
        return (now.exp() * (now - before)).sum(-1) <= config.limit

    return rule


def repeat(config: HaltingConfig) -> Rule:
    """The most probable token has stayed the same over the last so many iterations."""

    def rule(evidence: Evidence) -> Tensor:
        token = evidence.log_probabilities().argmax(-1)
        same = token == evidence.kept.get("token", torch.full_like(token, -1))
        times = torch.where(same, evidence.kept.get("times", torch.zeros_like(token)) + 1, 0)
        evidence.kept |= {"token": token, "times": times}
        return times >= config.limit

    return rule


def learned(config: HaltingConfig) -> Rule:
    """The exit head has probably stopped by now: the cumulative probability of its exits is at least the threshold.

    After iteration j the head stops with probability ``λ_j = sigmoid(w · h_j + b)`` if it did not before.

    Source:
        Ouro (arXiv:2510.25741), whose Q-exit takes the cumulative probability, too.
    """

    def rule(evidence: Evidence) -> Tensor:
        assert evidence.exit_head is not None, "MullModel has one if its rule is learned"
        goes_on = (-accurately(evidence.exit_head(evidence.state)[:, 0])).sigmoid()
        left = goes_on * evidence.kept.get("left", torch.ones_like(goes_on))
        evidence.kept["left"] = left
        return 1 - left >= config.limit

    return rule


def router(_config: HaltingConfig) -> Rule:
    """The depth router gave the token no more iterations, when the token entered the think block."""

    def rule(evidence: Evidence) -> Tensor:
        if "depth" not in evidence.kept:
            assert evidence.choose_depth is not None, "MullModel has a router if its rule is that"
            evidence.kept["depth"] = evidence.choose_depth(evidence.before)
        return evidence.kept["depth"] <= evidence.iteration

    return rule


RULES: dict[str, Callable[[HaltingConfig], Rule]] = {
    "fixed": fixed,
    "state": state,
    "confidence": confidence,
    "kl": kl,
    "repeat": repeat,
    "learned": learned,
    "router": router,
}
"""Rules by name."""


def make_rule(config: HaltingConfig) -> Rule:
    """Build the rule of a configuration: one of `RULES`, or of another package.

    Raises:
        ValueError: unknown name.
    """
    if config.rule in RULES:
        return RULES[config.rule](config)
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if config.rule not in points:
        raise ValueError(f"The halting rule {config.rule!r} is not known. {nearest(config.rule, [*RULES, *points])}")
    rule: Rule = points[config.rule].load()(config)
    return rule


class GivenDepths(Policy):
    """The policy of a call in which the iterations of each token are known beforehand.

    Args:
        depths: ``[B, T]``, at least 1.
        think_layers: The layers of the think block.
        stop: What stopped tokens leave behind.
        visits_per_iteration: How often an iteration visits a layer.
    """

    traceable = True

    def __init__(self, depths: Tensor, think_layers: range, stop: Stop, visits_per_iteration: int = 1) -> None:
        self.stop = stop
        self._depths = depths
        self._masks: dict[int, Tensor] = {}
        self._block = think_layers
        self._visits = visits_per_iteration

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens with more iterations than this visit's layer has run."""
        done = visit.occurrence // self._visits
        if visit.layer not in self._block or done == 0:
            return True
        if done not in self._masks:
            self._masks[done] = self._depths > done
        return self._masks[done]


class Halting(Policy):
    """The policy of one call in which tokens stop by a rule.

    Args:
        config: The rule, and what a stopped token leaves behind.
        think_layers: The layers of the think block.
        iterations: Most passes through it.
        tokens: ``[B, T]``, False for padding, which does not think beyond the first iteration; None without padding.
        readout: Early decoding, for rules that need it.
        exit_head: For the rule ``learned``.
        depth_router: For the rule ``router``.
        visits_per_iteration: How often an iteration visits a layer.

    Raises:
        ValueError: unknown rule, or one that needs an exit head or a router, without it.
    """

    def __init__(
        self,
        config: HaltingConfig,
        think_layers: range,
        iterations: int,
        *,
        tokens: Tensor | None = None,
        readout: Readout | None = None,
        exit_head: nn.Module | None = None,
        depth_router: DepthRouter | None = None,
        visits_per_iteration: int = 1,
    ) -> None:
        needed = {"learned": ("exit head", exit_head), "router": ("depth router", depth_router)}
        name, part = needed.get(config.rule, ("", self))
        if part is None:
            raise ValueError(
                f"The halting rule {config.rule!r} needs a trained {name}: load the model with "
                f"etd=ETDConfig(..., halting=HaltingConfig(rule={config.rule!r})), and train it."
            )
        self.config = config
        self.stop = config.stop
        self.iterations = iterations
        self.depth: Tensor | None = None
        """``[B, T]``: iterations of each token so far."""
        self.n_readouts = 0
        """Tokens that were decoded early, over all iterations."""
        self.router_logits: Tensor | None = None
        """``[B, T, k]`` of a depth router that was trained by the call, with their gradient."""
        self._rule = make_rule(config)
        self._block = think_layers
        self._tokens = tokens
        self._readout = readout
        self._exit_head = exit_head
        self._router = depth_router if config.rule == "router" else None
        self._trains = self._router is not None and self._router.training and torch.is_grad_enabled()
        self._entered: Tensor | None = None
        self._visits = visits_per_iteration
        self._before: Tensor | None = None
        self._thinking: Tensor | bool = True
        self._kept: dict[str, Tensor] = {}

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens that still think; all of them outside the think block and in its first iteration."""
        if visit.layer not in self._block:
            return True
        iteration, repeat = divmod(visit.occurrence, self._visits)
        if visit.layer == self._block.start and repeat == 0:
            if iteration == 0:
                self.depth = torch.ones(h.shape[:2], dtype=torch.long, device=h.device)
                # A mask of all tokens would have the layers gather them.
                everybody = self._tokens is None or bool(self._tokens.all())
                self._thinking, self._kept = True if everybody or self._tokens is None else self._tokens, {}
                self._entered = h if self._trains else None
            else:
                self._ask(iteration, h.detach())
            self._before = h.detach()
        return True if iteration == 0 else self._thinking

    @torch.no_grad()
    def _ask(self, iteration: int, h: Tensor) -> None:
        assert self.depth is not None, "the first iteration comes first"
        assert self._before is not None, "the first iteration comes first"
        if self._thinking is False:
            return
        everybody = torch.ones_like(self.depth, dtype=torch.bool)
        thinking = self._thinking if isinstance(self._thinking, Tensor) else everybody
        state = h[thinking]
        if not len(state):
            return
        choose = None if self._router is None else partial(self._router.choose, training=self._trains)
        before = self._before[thinking]
        evidence = Evidence(iteration, state, before, self._kept, self._readout, self._exit_head, choose)
        goes_on = ~self._answer(evidence)
        self.n_readouts += evidence.n_readouts
        if iteration < self.config.min_iterations:
            goes_on = torch.ones_like(goes_on)
        if not bool(goes_on.any()):
            self._thinking = False
        elif not bool(goes_on.all()):
            self._kept = {name: value[goes_on] for name, value in self._kept.items()}
            self._thinking = thinking.masked_scatter(thinking, goes_on)
        self.depth = self.depth + (self._thinking if isinstance(self._thinking, bool) else self._thinking.long())

    def _answer(self, evidence: Evidence) -> Tensor:
        """What the rule answers, checked: it may be of another package.

        Raises:
            TypeError: it is no tensor of booleans.
            ValueError: it is not one for each token, or what the rule keeps is not.
        """
        n_tokens, name = len(evidence.state), f"The halting rule {self.config.rule!r}"
        stops: Any = self._rule(evidence)
        if not isinstance(stops, Tensor) or stops.dtype != torch.bool:
            kind = stops.dtype if isinstance(stops, Tensor) else type(stops).__name__
            raise TypeError(f"{name} gave {kind}: give a tensor of booleans, True for tokens that stop.")
        kept: Any = {f"kept[{key!r}]": value for key, value in evidence.kept.items()}
        for what, value in {"what it gave": stops, **kept}.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else None
            if not shape or shape[0] != n_tokens or (value is stops and len(shape) > 1):
                raise ValueError(
                    f"{name} was asked about {n_tokens} tokens, and {what} is {shape or type(value).__name__}: it takes a tensor "
                    "with an entry for each token."
                )
        return stops

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The same states, with a gradient to the depth router: an iteration's update counts with the probability that it runs.

        In the value that is 1 or 0. Tokens that do not run it learn nothing from it.
        """
        iteration, left = divmod(visit.occurrence + 1, self._visits)
        if self._entered is None or visit.layer != self._block[-1] or left or iteration == 1:
            return after
        assert self._router is not None, "it is trained"
        assert self._before is not None, "the iteration has begun"
        if self.router_logits is None:
            with torch.enable_grad():  # the first iterations may be cut off, and the last ones learn nevertheless
                self.router_logits = self._router.gate(self._entered)
        chance = self._router.going_on(self.router_logits, iteration, self.config.min_iterations, self.iterations)
        return after + (chance - chance.detach()).to(after.dtype)[..., None] * (after.detach() - self._before)

    def metrics(self) -> dict[str, Any]:
        """What happened, for `MullOutput.metrics`.

        Returns:
            ``think_iterations [B, T]``; ``early_exit [B, T]``, True where a token stopped before the last possible iteration;
            and ``readouts``, the number of tokens that were decoded early.
        """
        assert self.depth is not None, "asked after the call"
        early = self.depth < self.iterations
        if self._tokens is not None:
            early = early & self._tokens
        return {"think_iterations": self.depth, "early_exit": early, "readouts": self.n_readouts}
