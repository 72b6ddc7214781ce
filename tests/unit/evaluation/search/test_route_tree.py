"""Claim: the tree search keeps to the limits of a route, scores as published, and finds edits that pay. No model is needed."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from mull.evaluation.search.route_tree import Route, RouteSearchConfig, RouteTree, edits, is_allowed, ucb


def searched(n_layers: int, scope: range, reward: Any, seed: int = 0, **options: Any) -> dict[Route, float]:
    """Rewards of the routes that a search asked for, each asked once, and all nodes credited."""
    config = RouteSearchConfig(**options)
    tree = RouteTree(n_layers, scope, config, np.random.default_rng(seed))
    seen = {tree.root.route: reward(tree.root.route)}
    tree.credit([tree.root], seen[tree.root.route])
    for _ in range(config.simulations):
        walk = tree.descend()
        route = walk[-1].route
        seen.setdefault(route, reward(route))
        tree.credit(walk, seen[route])
    return seen


def test_allowed_routes_are_those_of_the_rule_spelled_out() -> None:
    for route in itertools.product((0, 1, 2), repeat=5):
        text = "".join(map(str, route))
        assert is_allowed(route) == ("000" not in text)
    assert is_allowed((0, 1))
    assert not is_allowed((0, 0))
    assert not is_allowed((0,))


def test_edits_change_one_layer_of_the_scope() -> None:
    found = edits((1, 0, 0, 1, 2), range(3, 5))
    assert found == [(1, 0, 0, 2, 2), (1, 0, 0, 1, 0), (1, 0, 0, 1, 1)]  # a third skip in succession is left out


@pytest.mark.parametrize("seed", range(3))
def test_every_route_of_a_search_keeps_the_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = searched(9, range(2, 7), lambda route: float(rng.random()), seed, simulations=400)
    assert len(seen) > 50
    for route in seen:
        assert route[:2] == route[7:] == (1, 1)
        assert set(route) <= {0, 1, 2}
        assert "000" not in "".join(map(str, route))
        assert sum(route) <= 2 * 9
    assert max(9 - route.count(1) for route in seen) > 2


def test_the_score_is_that_of_the_paper() -> None:
    config = RouteSearchConfig()
    assert ucb(3.0, 4, 20, 27, 28, config) == pytest.approx(3 / 4 + 1.8 * math.sqrt(math.log(20) / 4) - 3.0 * 27 / 28)
    # By hand: ln 55 = 4.00733, over 4 it is 1.00183, its root 1.00092; 1.5 / 4 + 2 * 1.00092 - 1 * 5 / 10.
    by_hand = RouteSearchConfig(exploration=2.0, length_penalty=1.0)
    assert ucb(1.5, 4, 55, 5, 10, by_hand) == pytest.approx(1.87683, abs=1e-5)


def test_the_best_child_is_followed_and_a_random_one_now_and_then() -> None:
    def followed(random_child: float, n: int = 200) -> list[bool]:
        config = RouteSearchConfig(random_child=random_child, breadth=1e-9, exploration=0.0, length_penalty=0.0)
        found = []
        for seed in range(n):
            tree = RouteTree(4, range(4), config, np.random.default_rng(seed))
            # One child after the other, until all are open.
            for _ in range(8):
                tree.root.opened.append(tree._node(tree.root.untried.pop()))
            for place, child in enumerate(tree.root.opened):
                child.visits, child.value = 1, float(place == 3)
            found.append(tree.descend()[1] is tree.root.opened[3])
        return found

    assert all(followed(0.0))
    assert sum(followed(1.0)) / 200 == pytest.approx(1 / 8, abs=0.08)
    assert sum(followed(0.1)) / 200 == pytest.approx(0.9 + 0.1 / 8, abs=0.06)


def test_visits_and_rewards_reach_every_node_of_a_descent() -> None:
    tree = RouteTree(4, range(4), RouteSearchConfig(), np.random.default_rng(0))
    for _ in range(30):
        walk = tree.descend()
        before = [(node.visits, node.value) for node in walk]
        tree.credit(walk, 0.5)
        assert [(node.visits, node.value) for node in walk] == [(visits, value + 0.5) for visits, value in before]
    assert tree.root.visits == 31  # the plain route counts
    assert tree.root.value == 15.0


def test_descents_in_flight_go_to_different_routes() -> None:
    tree = RouteTree(12, range(12), RouteSearchConfig(), np.random.default_rng(0))
    assert len({tree.descend()[-1].route for _ in range(8)}) == 8


def test_a_small_space_is_exhausted_and_the_search_ends() -> None:
    seen = searched(2, range(2), lambda route: 0.0, simulations=60)
    assert set(seen) == {route for route in itertools.product((0, 1, 2), repeat=2) if any(route)}


def test_rewards_lead_deeper() -> None:
    """Skipping layers 2, 5 and 8 is right, in any number. Rewards find more of these 7 routes than the same search without."""
    good = [tuple(0 if layer in {2, 5, 8} and part[layer // 3] else 1 for layer in range(10)) for part in ITS_PARTS]

    def n_found(told: bool) -> int:
        def reward(route: Route) -> float:
            return float(told and route in good)

        options = {"simulations": 200, "exploration": 0.2}
        return sum(len(searched(10, range(10), reward, seed, **options).keys() & set(good)) for seed in range(10))

    assert n_found(True) > 1.15 * n_found(False)


ITS_PARTS = [part for part in itertools.product((False, True), repeat=4) if any(part[:3]) and not part[3]]
