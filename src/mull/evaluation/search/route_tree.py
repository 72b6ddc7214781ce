"""Monte-Carlo tree search over routes: the search alone, without a model.

A route has one action per layer: 0 skips it, 1 runs it, 2 runs it twice in succession. The plain route, all 1, is the root. A
child changes one more layer that runs once.

Source:
    Dr.LLM (arXiv:2510.12773), section 3: the score, its constants, and the limits of a route. Differences:

    * A layer runs at most twice, which the paper says and the released code does not enforce. So a path has at most 2L visits.
    * An edit changes one layer; two skipped neighbours are two edits. The paper also skips two at once.
    * A root of 30 layers has 60 children, more than the 50 simulations. Trying each before any is followed would never leave the
      first level, so a node opens children gradually (progressive widening: Coulom 2007; Chaslot et al. 2008).
    * A route that several orders of edits lead to is one node.
    * The whole budget is spent. The released code stops at the first improvement.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from mull.runtime.arguments import Frozen

Route = tuple[int, ...]
"""Action of each layer: 0 skip, 1 execute, 2 repeat."""

MAX_SKIPPED = 2
"""Most layers skipped in succession."""


class RouteSearchConfig(Frozen):
    """How routes are searched. Constants are those of the paper where it has them."""

    labeller: Literal["checker", "loss"] = "checker"
    """What makes a route correct, see `mull.evaluation.search.routes.judged`."""

    scope: Literal["think", "all"] = "think"
    """Layers that may be skipped or repeated: those of the think block, or all. A model without one has all."""

    simulations: int = Field(default=50, ge=1)
    """Descents of the tree per question."""

    exploration: float = Field(default=1.8, ge=0)
    """c of the score."""

    length_penalty: float = Field(default=3.0, ge=0)
    """λ of the score."""

    random_child: float = Field(default=0.1, ge=0, le=1)
    """Probability of a random child instead of the best."""

    breadth: float = Field(default=0.5, gt=0)
    """A node that was visited V times has opened at most ``1 + breadth · V`` children. Ours."""

    batch_size: int = Field(default=8, ge=1)
    """Routes in flight. Each waits for its result with reward 0, which sends the next one elsewhere (virtual loss)."""

    seed: int = Field(default=0, ge=0)


def is_allowed(route: Sequence[int]) -> bool:
    """Whether a route runs a layer, and skips at most two layers in succession."""
    return all(any(route[first : first + MAX_SKIPPED + 1]) for first in range(max(1, len(route) - MAX_SKIPPED)))


def edits(route: Route, scope: Sequence[int]) -> list[Route]:
    """Allowed routes with another action at one layer of `scope`."""
    changed = ((*route[:layer], action, *route[layer + 1 :]) for layer in scope for action in (0, 1, 2))
    return [edited for edited in changed if edited != route and is_allowed(edited)]


def ucb(value: float, visits: int, parent_visits: int, length: int, n_layers: int, config: RouteSearchConfig) -> float:
    """``Q/v + c √(ln V / v) - λ |π| / L``: how promising a child is.

    Args:
        value: Q, summed rewards.
        visits: v, visits of the child.
        parent_visits: V, visits of its parent.
        length: |π|, layers that the route runs.
        n_layers: L.
        config: c and λ.
    """
    explore = config.exploration * math.sqrt(math.log(parent_visits) / visits)
    return value / visits + explore - config.length_penalty * length / n_layers


class Node:
    """A route in the tree."""

    def __init__(self, route: Route, untried: list[Route]) -> None:
        self.route, self.untried = route, untried
        self.opened: list[Node] = []
        self.visits, self.value = 0, 0.0


class RouteTree:
    """The tree of one question. Call `descend`, evaluate the last node's route, and `credit` the nodes.

    Args:
        n_layers: Layers of the model, L.
        scope: Layers that may be skipped or repeated.
        config: Settings of the search.
        rng: Draws untried and random children.
    """

    def __init__(self, n_layers: int, scope: range, config: RouteSearchConfig, rng: np.random.Generator) -> None:
        self._scope, self._config, self._rng = scope, config, rng
        self._nodes: dict[Route, Node] = {}
        self.root = self._node((1,) * n_layers)
        self.root.visits = 1  # it is evaluated first, and is no descent

    def descend(self) -> list[Node]:
        """Nodes from the root to a route that was not visited before, or to one that has no children. Each counts a visit."""
        walk = [self.root]
        while walk[-1].visits and (child := self._child(walk[-1])) is not None:
            walk.append(child)
        for node in walk:
            node.visits += 1
        return walk

    @staticmethod
    def credit(walk: Sequence[Node], reward: float) -> None:
        """Add the reward of the last route, in [0, 1], to all nodes of a descent."""
        for node in walk:
            node.value += reward

    def _child(self, node: Node) -> Node | None:
        n_children = len(node.untried) + len(node.opened)
        if not n_children:
            return None
        if self._rng.random() < self._config.random_child:
            place = int(self._rng.integers(n_children)) - len(node.untried)
            return self._open(node) if place < 0 else node.opened[place]
        if node.untried and len(node.opened) < 1 + self._config.breadth * node.visits:
            return self._open(node)
        n_layers = len(node.route)
        rated = [ucb(x.value, x.visits, node.visits, sum(x.route), n_layers, self._config) for x in node.opened]
        return node.opened[rated.index(max(rated))]

    def _open(self, node: Node) -> Node:
        child = self._node(node.untried.pop())  # their order is random
        node.opened.append(child)
        return child

    def _node(self, route: Route) -> Node:
        if route not in self._nodes:
            children = [edit for edit in edits(route, self._scope) if edit.count(1) < route.count(1)]
            self._nodes[route] = Node(route, [children[place] for place in self._rng.permutation(len(children))])
        return self._nodes[route]
