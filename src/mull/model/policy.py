"""Policies decide which tokens run a visit. They own decisions and nothing else: `mull.model.executor` does the running."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mull.model.configs import Stop
from mull.model.path import Visit


class Policy(Protocol):
    """Decides at each visit of a path who runs it. A call without a policy runs every token at every visit."""

    @property
    def stop(self) -> Stop:
        """What tokens that do not run leave behind."""

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """``[B, T]``, True for tokens that run `visit`, given the states ``[B, T, D]`` before it; or one answer for all of them.

        Visits that the same tokens run should be given the same tensor, which is then looked at once.
        """


class GivenTokens:
    """The tokens that run a visit are known beforehand.

    Args:
        masks: ``[B, T]`` by visit, or one answer for all tokens; at visits without a mask, every token runs.
        stop: What tokens that do not run leave behind.
    """

    def __init__(self, masks: Mapping[Visit, Tensor | bool], stop: Stop = "last_kv") -> None:
        self._masks = masks
        self.stop: Stop = stop

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """The visit's mask."""
        return self._masks.get(visit, True)
