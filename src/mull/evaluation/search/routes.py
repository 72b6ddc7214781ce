"""Route search: which layers a model should skip or repeat, for each question, or one route for a whole data set.

Source:
    Dr.LLM (arXiv:2510.12773) labels each question with the shortest route that keeps or makes its answer right; the tree search
    is `mull.evaluation.search.route_tree`, with what differs. The reward of the labeller ``loss`` and the search of one route
    for a data set are ours.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator

from mull.data.route_labels import RouteLabel, read_labels
from mull.evaluation.search.loop_probe import mean_and_error
from mull.evaluation.search.route_scores import RouteTask, Score, SharedRuns
from mull.evaluation.search.route_tree import Route, RouteSearchConfig, RouteTree, edits, is_allowed
from mull.model.causal_lm import MullForCausalLM
from mull.runtime.arguments import Frozen
from mull.runtime.progress import Progress
from mull.runtime.storage import exclusive

Method = Literal["greedy", "evolution"]

PARENTS = 8
"""Routes that a generation of twice as many is bred from."""

N_CONTROLS = 8
"""Random routes of equal cost; fewer where a thousand draws do not find so many."""


def routed_layers(model: MullForCausalLM, scope: Literal["think", "all"]) -> range:
    """Layers that may be skipped or repeated; all of a model without a think block."""
    etd = model.etd_config
    return range(len(model.model.layers)) if etd is None or scope == "all" else etd.think_layers


def judged(config: RouteSearchConfig, score: Score, base: Score) -> tuple[bool, float]:
    """Whether a route is correct, and its reward from 0 to 1.

    ``checker``: correct is `Score.correct`, and the reward 1 or 0. ``loss``: correct is a loss that is no higher than that of the
    plain route; the reward is ``p / (p + p₀)``, where p and p₀ are the probabilities of the answer along the route and along the
    plain one, as geometric means over its tokens. That is 1/2 for the plain route.

    Args:
        config: Has the labeller.
        score: Along the route.
        base: Along the plain route.
    """
    if config.labeller == "checker":
        return score.correct, float(score.correct)
    return score.loss <= base.loss, float(np.exp(-np.logaddexp(0.0, score.loss - base.loss)))


def label_questions(task: RouteTask, path: Path, config: RouteSearchConfig) -> list[RouteLabel]:
    """Find a route for each question, and write it to a file of `mull.data.route_labels` as soon as it is found.

    A file that has some of the labels is continued. What a question gets depends on its number and the seed, not on that. Models
    are told apart by their names: give a model that was trained further another file.

    Raises:
        ValueError: the file has other settings or other questions, or a question does not fit the model.
        RuntimeError: another process writes the file.
    """
    scope, base = routed_layers(task.model, config.scope), task.model.config.get_text_config()
    name = task.model.config.name_or_path or base.name_or_path  # a base checkpoint has only the latter
    settings = {"model": name, "layers": [*scope], "end": task.end} | config.model_dump(mode="json")
    rows = [task.rows([number], config.labeller == "checker") for number in range(len(task.questions))]
    with exclusive(path), Progress(len(rows), "question", label="routes") as progress:
        labels = _continued(path, settings, task)
        progress.advance(len(labels))
        for index in range(len(labels), len(rows)):
            runs = SharedRuns(task.model, rows[index], config.batch_size)
            labels.append(_label(task, index, runs, scope, config))
            with path.open("a", encoding="utf-8") as file:
                file.write(labels[-1].model_dump_json() + "\n")
            progress.advance(text=f"{sum(label.correct for label in labels)} with a right route")
    return labels


def _continued(path: Path, settings: dict[str, Any], task: RouteTask) -> list[RouteLabel]:
    """The labels that a file has, after its half-written last line is dropped; none in a new file."""
    size = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    if not size:
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    found, labels = read_labels(path)
    different = sorted(key for key in found | settings if found.get(key) != settings.get(key))
    pairs = zip(labels, task.questions, strict=False)
    others = any((label.prompt, label.answer) != (question.prompt, question.answer) for label, question in pairs)
    if different or others:
        names = ", ".join(different + ["task"] * others)
        raise ValueError(f"{path} was written with other settings ({names}): give them again, or another file.")
    if size:
        os.truncate(path, size)
    return labels


def _label(task: RouteTask, index: int, runs: SharedRuns, scope: range, config: RouteSearchConfig) -> RouteLabel:
    """Search the tree of one question."""
    tree = RouteTree(len(task.model.model.layers), scope, config, np.random.default_rng((config.seed, index)))
    plain, walks = tree.root.route, [[tree.root]]
    scores: dict[Route, Score] = {}
    while walks:
        new = list(dict.fromkeys(walk[-1].route for walk in walks if walk[-1].route not in scores))
        scores |= {route: score for route, [score] in zip(new, runs.scores(new), strict=True)}
        for walk in walks:
            tree.credit(walk, judged(config, scores[walk[-1].route], scores[plain])[1])
        # The plain route is a visit, and no simulation.
        walks = [tree.descend() for _ in range(min(config.batch_size, config.simulations + 1 - tree.root.visits))]
    base, question = scores[plain], task.questions[index]
    right = [route for route, score in scores.items() if judged(config, score, base)[0]]
    best = min(right or [plain], key=lambda route: (sum(route), scores[route].loss))
    results = {"correct": bool(right), "base_correct": plain in right, "evaluated": len(scores)}
    losses = {"loss": scores[best].loss, "base_loss": base.loss, "simulations": config.simulations}
    cost = {"visits": sum(best), "layers": runs.layers, "layers_unshared": runs.layers_unshared}
    facts = {"index": index, "prompt": question.prompt, "answer": question.answer, "route": best}
    return RouteLabel.model_validate(facts | results | losses | cost)


class RouteCost(Frozen):
    """What one route for all questions costs, against the plain route."""

    route: Route
    loss: float
    """Nats per token of the answers."""

    change: float
    """The loss minus that of the plain route."""

    standard_error: float
    """Of `change`, over questions."""

    correct: float
    """Share of questions with a right answer."""


class BestRoute(Frozen):
    """One route for a data set. It was chosen on one half of the questions, and its cost is measured on the other half."""

    method: Method
    plain: RouteCost
    found: RouteCost
    controls: tuple[RouteCost, ...]
    """Random routes with as many skips and repeats as the found one; none if that is plain."""

    n_questions: int
    """Questions of the half that costs are measured on."""

    evaluated: int
    """Routes that the search ran on the other half."""

    layers: int
    """Layers that the search ran per batch of questions, common beginnings shared."""

    layers_unshared: int
    """Layers of these routes, one by one."""


class _Half:
    """Half of the questions, in batches, and how routes do on them."""

    def __init__(self, task: RouteTask, chosen: Sequence[int], size: int) -> None:
        self._model = task.model
        self._batches = [task.rows(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        self.scores: dict[Route, list[Score]] = {}
        self.layers = self.layers_unshared = 0

    def run(self, routes: Sequence[Route]) -> None:
        """Score routes on every question."""
        new = [route for route in dict.fromkeys(routes) if route not in self.scores]
        self.scores |= {route: [] for route in new}
        for rows in self._batches:
            runs = SharedRuns(self._model, rows, 1)  # one cache at a time: memory does not grow with the questions
            for route in new:
                self.scores[route] += runs.scores([route])[0]
            self.layers, self.layers_unshared = self.layers + runs.layers, self.layers_unshared + runs.layers_unshared

    def loss(self, route: Route) -> float:
        """Nats, summed over the answers; infinite for a route that did not run."""
        return sum(score.loss * score.n_tokens for score in self.scores.get(route, [Score(False, float("inf"), 1)]))

    def within(self, most: int) -> list[Route]:
        """Routes of at most so many visits, that of least loss first."""
        return sorted((route for route in self.scores if sum(route) <= most), key=self.loss)

    def cost(self, route: Route, plain: Route) -> RouteCost:
        """The route against the plain one."""
        pairs = [*zip(self.scores[route], self.scores[plain], strict=True)]
        counts = torch.tensor([base.n_tokens for _, base in pairs], dtype=torch.float64)
        mean, error = mean_and_error(counts * torch.tensor([score.loss - base.loss for score, base in pairs]), counts)
        loss, correct = self.loss(route) / float(counts.sum()), sum(score.correct for score, _ in pairs) / len(pairs)
        return RouteCost(route=route, loss=loss, change=float(mean), standard_error=float(error), correct=correct)


def best_route(task: RouteTask, method: Method, config: RouteSearchConfig, max_visits: int | None = None) -> BestRoute:
    """Find one route for all questions: the one of least loss.

    ``greedy`` takes the best edit of one layer again and again: while the route is over the budget, the best that shortens it;
    then the best within the budget, until none lowers the loss. ``evolution`` keeps the 8 best routes within the budget, and
    mutates them.

    Args:
        task: At least 4 questions. They are shuffled, and halved.
        method: How to search.
        config: Its scope and seed, ``simulations`` as the most routes to run, and ``batch_size`` as the questions of a batch.
        max_visits: Most layers that the route may run, repeats counted twice; default: as many as the plain route.

    Raises:
        ValueError: too few questions, a budget of visits that may not be reached, or none that was reached.
    """
    plain, layers = (1,) * len(task.model.model.layers), routed_layers(task.model, config.scope)
    most, least = max_visits or len(plain), len(plain) - len(layers) // 2
    if len(task.questions) < 4 or most < least:
        raise ValueError(
            f"There are {len(task.questions)} questions, and {most} visits at most: give at least 4 questions, to search on one "
            f"half and measure on the other, and {least} visits, which single edits always reach."
        )
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(task.questions)).tolist()
    search, report = (_Half(task, half, config.batch_size) for half in (order[::2], order[1::2]))
    with Progress(None, "route", label=method, patient=True) as progress:
        for routes in SEARCHES[method](search, plain, layers, most, rng):
            search.run(routes[: config.simulations - len(search.scores)])
            progress.advance(len(search.scores) - progress.done)
            if len(search.scores) == config.simulations:
                break
    if not (within := search.within(most)):
        raise ValueError(f"None of {config.simulations} routes has at most {most} visits: allow more simulations.")
    routes = [plain, within[0], *_controls(within[0], layers, rng)]
    report.run(routes)
    costs = [report.cost(route, plain) for route in routes]
    counts = {"n_questions": len(order) // 2, "evaluated": len(search.scores), "layers": search.layers}
    facts = {"method": method, "plain": costs[0], "found": costs[1], "controls": costs[2:]}
    return BestRoute.model_validate(facts | counts | {"layers_unshared": search.layers_unshared})


def _greedy(half: _Half, plain: Route, layers: range, most: int, _: Generator) -> Iterator[list[Route]]:
    """Routes to run next, again and again."""
    route, better = plain, True
    while better:
        near = [edit for edit in edits(route, layers) if sum(edit) <= max(most, sum(route) - 1)]
        yield [route, *near]
        best = min(near, key=half.loss, default=route)
        better, route = sum(route) > most or half.loss(best) < half.loss(route), best


def _evolution(half: _Half, plain: Route, layers: range, most: int, rng: Generator) -> Iterator[list[Route]]:
    """Routes to run next, again and again, until a generation has no new one."""
    new = {plain}
    while new:
        yield sorted(new)  # neighbours in this order share the longest beginnings
        parents = half.within(most)[:PARENTS] or [plain]
        children = {_mutated(parents[rng.integers(len(parents))], layers, most, rng) for _ in range(2 * PARENTS)}
        new = children - half.scores.keys()


def _mutated(route: Route, layers: range, most: int, rng: Generator) -> Route:
    """One or two random edits, and as many shortening ones as it takes to come within the budget."""
    n_free = int(rng.integers(1, 3))
    while near := [edit for edit in edits(route, layers) if n_free > 0 or most < sum(route) > sum(edit)]:
        route, n_free = near[rng.integers(len(near))], n_free - 1
    return route


SEARCHES = {"greedy": _greedy, "evolution": _evolution}


def _controls(found: Route, layers: range, rng: Generator) -> list[Route]:
    """Random routes with the skips and repeats of another one."""
    drawn: set[Route] = set()
    for _ in range(1000):
        actions = rng.permutation([found[layer] for layer in layers]).tolist()
        route = (*found[: layers.start], *actions, *found[layers.stop :])
        if is_allowed(route) and route != found and len(drawn) < N_CONTROLS:
            drawn.add(route)
    return sorted(drawn)
