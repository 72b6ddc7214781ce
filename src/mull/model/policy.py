"""Policies decide which tokens run a visit. They own decisions and nothing else: `mull.model.executor` does the running."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mull.model.configs import Stop
from mull.model.path import Visit

Extra = Mapping[str, Tensor]
"""Keyword arguments of a layer beyond those of transformers, ``[B, T, ...]`` each. Hooks on the layer take them out."""

NOTHING: Extra = {}


class Policy:
    """Decides at each visit of a path who runs it. A call without a policy runs every token at every visit."""

    stop: Stop = "last_kv"
    """What tokens that do not run leave behind."""

    traceable = False
    """Whether ``torch.compile`` may trace the decisions: they read no values."""

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """``[B, T]``, True for tokens that run `visit`, given the states ``[B, T, D]`` before it; or one answer for all of them.

        Visits that the same tokens run should be given the same tensor, which is then looked at once.
        """
        return True

    def extra(self, visit: Visit) -> Extra:
        """What the hooks of this policy on the layer need to know about the call's tokens; asked after `active`."""
        return NOTHING

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The states ``[B, T, D]`` that tokens go on with, from those before and after a visit.

        Here a decision gets its gradient, and a gate its effect.
        """
        return after

    def metrics(self) -> dict[str, Any]:
        """What was decided, for `MullOutput.metrics`."""
        return {}


class GivenTokens(Policy):
    """The tokens that run a visit are known beforehand.

    Args:
        masks: ``[B, T]`` by visit, or one answer for all tokens; at visits without a mask, every token runs.
        stop: What tokens that do not run leave behind.
    """

    traceable = True

    def __init__(self, masks: Mapping[Visit, Tensor | bool], stop: Stop = "last_kv") -> None:
        self._masks = masks
        self.stop = stop

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """The visit's mask."""
        return self._masks.get(visit, True)


class Together(Policy):
    """Several policies: a token runs a visit if all of them let it.

    Args:
        policies: At least one, all with the same kind of stopping.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = policies
        self.stop = policies[0].stop
        self.traceable = all(policy.traceable for policy in policies)
        assert all(policy.stop == self.stop for policy in policies), "a model has one kind of stopping"

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens that all let run. Those after one that lets nobody run are asked too: they may keep a count."""
        running: Tensor | bool = True
        for policy in self.policies:
            answer = policy.active(visit, h)
            if running is True or answer is False:
                running = answer
            elif running is not False and answer is not True:
                running = running & answer
        return running

    def extra(self, visit: Visit) -> Extra:
        """That of all of them."""
        return {name: value for policy in self.policies for name, value in policy.extra(visit).items()}

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """Let each weigh what the one before gave."""
        for policy in self.policies:
            after = policy.weigh(visit, before, after)
        return after

    def metrics(self) -> dict[str, Any]:
        """Those of all of them."""
        return {name: value for policy in self.policies for name, value in policy.metrics().items()}


def running(runs: Tensor, tokens: Tensor | None) -> Tensor | bool:
    """The answer of `Policy.active` where tokens decided by themselves.

    Args:
        runs: ``[B, T]``.
        tokens: ``[B, T]``, False for padding, which runs only if all others do; None without.
    """
    real = runs if tokens is None else runs & tokens
    if not bool(real.any()):
        return False
    every = runs if tokens is None else runs | ~tokens
    return True if bool(every.all()) else real
