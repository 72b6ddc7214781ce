"""What layer routers decide, beside the labels that a search found, and what their decisions are worth.

Routers decide by themselves, each on the states that the decisions before it give, with one iteration, as labels have it. What a
decision is worth is the loss of the answers, beside routes of equal cost that do not look at the question.

Shapes: N questions, R routed layers, T tokens of a question and its answer.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mull.data.route_labels import RouteRows
from mull.evaluation.search.loop_probe import mean_and_error
from mull.evaluation.search.route_scores import Rows, Score
from mull.evaluation.search.route_tree import Route
from mull.layers.routers import EXECUTE, REPEAT, SKIP
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig
from mull.model.path import Visit
from mull.model.policy import GivenTokens
from mull.ops.targets import IGNORED, targets_of
from mull.runtime.arguments import Frozen
from mull.runtime.progress import tracked
from mull.training.objectives.routing import check_route_labels

N_RANDOM = 8
"""Draws of random routes."""


class Agreement(Frozen):
    """How far routers decide as the labels say. Of routers of tokens, a question counts with the shares of its tokens."""

    confusion: tuple[tuple[float, float, float], ...]
    """Decisions by label, then by decision: skip, execute, repeat."""

    macro_f1: float
    """Mean F1 over the actions that a label or a decision has."""

    accuracy: float
    """Share of right decisions."""

    layer_accuracy: tuple[float, ...]
    """The same for each layer with a router."""

    label_visits: float
    """Layers that a token runs along the labels, repeats counted twice; a mean over questions."""

    visits: float
    """The same along the decisions."""


class DecisionCost(Frozen):
    """What decisions about all questions cost, against running every layer once."""

    visits: float
    """Layers that a token runs, repeats counted twice; a mean over questions."""

    loss: float
    """Nats per token of the answers."""

    change: float
    """The loss minus that of the plain route."""

    standard_error: float
    """Of `change`, over questions."""

    correct: float
    """Share of questions whose answer greedy decoding writes."""


class RouteReport(Frozen):
    """What routers decide about labelled questions, and what that is worth."""

    n_questions: int
    agreement: Agreement
    costs: dict[str, DecisionCost]
    """``plain``; ``labels``, the routes that the search found, answers known; ``routers``; ``random``, the routers' decisions
    of each layer dealt anew among the questions; ``fixed``, one route of the routers' most frequent skips and repeats, as many
    as they take on average; and the routes that the caller adds."""


def report_routers(
    model: MullForCausalLM, rows: RouteRows, *, routes: Mapping[str, Route] | None = None, batch_size: int = 8
) -> RouteReport:
    """Measure routers on labelled questions that they were not trained on.

    Args:
        model: In evaluation mode.
        rows: The questions.
        routes: Fixed routes to measure beside them, such as `mull.evaluation.search.routes.best_route` finds.
        batch_size: Rows that run together.

    Raises:
        ValueError: the model has no routers, they still warm up, or a route is none of theirs.
    """
    etd = _checked(model, rows.route_labels)
    actions = _decisions(model, rows, batch_size)
    chosen = {"fixed": _most_frequent(_shares(actions), etd), **(routes or {})}
    check_route_labels(torch.tensor(list(chosen.values())), etd)
    dealt = [_dealt(actions, etd, seed) for seed in range(N_RANDOM)]
    scores: dict[str, list[list[Score]]] = {}
    visits: dict[str, list[float]] = {}
    for number in tracked(range(len(rows)), "question", "routers", len(rows)):
        row = rows.rows(torch.tensor([number]))
        label = tuple(rows.route_labels[number].tolist())
        candidates = {name: [_along(route, etd, row)] for name, route in ({"labels": label} | chosen).items()}
        candidates |= {"plain": [_along((EXECUTE,) * etd.n_layers, etd, row)], "routers": [actions[number]]}
        candidates |= {"random": [draw[number] for draw in dealt]}
        found = _scores(model, row, [each for of_name in candidates.values() for each in of_name], batch_size)
        for name, of_name in candidates.items():
            scores.setdefault(name, []).append([next(found) for _ in of_name])
            visits.setdefault(name, []).append(_visits(torch.stack(of_name), etd))
    order = ["plain", "labels", "routers", "random", *chosen]
    costs = {name: _cost(scores[name], scores["plain"], visits[name]) for name in order}
    return RouteReport(n_questions=len(rows), agreement=_agreement(actions, rows, etd), costs=costs)


def route_agreement(model: MullForCausalLM, rows: RouteRows, batch_size: int = 8) -> Agreement:
    """How far a model's routers decide as labels say.

    Raises:
        ValueError: the model has no routers, they still warm up, or a label is none of theirs.
    """
    etd = _checked(model, rows.route_labels)
    return _agreement(_decisions(model, rows, batch_size), rows, etd)


def _checked(model: MullForCausalLM, labels: Tensor) -> ETDConfig:
    etd = model.etd_config
    routers = None if model.etd is None else model.etd.layer_routers
    if etd is None or routers is None:
        raise ValueError("The model has no layer routers: train some (train.algo=routing).")
    if routers.warms_up:
        raise ValueError(
            f"The routers still warm up, and execute every layer: they were trained for {int(routers.n_steps)} of "
            f"{routers.warmup_steps} steps (etd.router_warmup_steps)."
        )
    check_route_labels(labels, etd)
    return etd


@torch.no_grad()
def _decisions(model: MullForCausalLM, rows: RouteRows, batch_size: int) -> list[Tensor]:
    """Actions ``[R, T]`` of each question."""
    found: list[Tensor] = []
    for numbers in torch.arange(len(rows)).split(batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in rows.rows(numbers).items()}
        out = model.model(
            batch["input_ids"],
            batch["attention_mask"],
            prompt_mask=batch["labels"] == IGNORED,
            think_iterations=1,
            adaptive=False,
            use_cache=False,
        )
        actions = torch.stack(out.metrics["router_actions"], 1)
        lengths = batch["attention_mask"].sum(1).tolist()
        found += [of_row[:, :length] for of_row, length in zip(actions, lengths, strict=True)]
    return found


def _shares(actions: Sequence[Tensor]) -> Tensor:
    """``[N, R, 3]``: share of a question's tokens with each action."""
    return torch.stack([F.one_hot(of_row, 3).double().mean(1) for of_row in actions])


def _agreement(actions: Sequence[Tensor], rows: RouteRows, etd: ETDConfig) -> Agreement:
    decided = _shares(actions).cpu()
    labelled = F.one_hot(rows.route_labels[:, list(etd.routed_layers)], 3).double()
    confusion = torch.einsum("nry,nra->ya", labelled, decided)
    right = (labelled * decided).sum(-1)
    times = torch.arange(3, dtype=torch.float64)
    rest = etd.n_layers - len(etd.routed_layers)
    return Agreement(
        confusion=tuple(map(tuple, confusion.tolist())),
        macro_f1=macro_f1(confusion),
        accuracy=float(right.mean()),
        layer_accuracy=tuple(right.mean(0).tolist()),
        label_visits=rest + float((labelled @ times).sum(1).mean()),
        visits=rest + float((decided @ times).sum(1).mean()),
    )


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over actions, of counts ``[label, decision]``. Actions that neither has are left out."""
    used = confusion.sum(0) + confusion.sum(1)
    return float((2 * confusion.diagonal() / used)[used > 0].mean())


def _most_frequent(shares: Tensor, etd: ETDConfig) -> Route:
    """The route of the actions that are decided most often, with as many of each as an average question has."""
    route, mean = [EXECUTE] * etd.n_layers, shares.mean(0).cpu()
    for action in (SKIP, REPEAT):
        count = round(float(mean[:, action].sum()))
        free = [layer for layer in etd.routed_layers if route[layer] == EXECUTE]
        free.sort(key=lambda layer: -float(mean[layer - etd.routed_layers.start, action]))
        for layer in free[:count]:
            route[layer] = action
    return tuple(route)


def _dealt(actions: Sequence[Tensor], etd: ETDConfig, seed: int) -> list[Tensor]:
    """The same decisions of each layer in random order: of all questions, or of all tokens where these decide."""
    assert etd.router is not None, "checked before"
    units = [of_row[:, :1] if etd.router.granularity == "sequence" else of_row for of_row in actions]
    rng = np.random.default_rng(seed)
    dealt = torch.stack([of_layer[rng.permutation(len(of_layer))] for of_layer in torch.cat(units, 1)])
    parts = dealt.split([unit.shape[1] for unit in units], 1)
    return [part.expand_as(of_row) for part, of_row in zip(parts, actions, strict=True)]


def _along(route: Route, etd: ETDConfig, row: Mapping[str, Tensor]) -> Tensor:
    """A route as actions ``[R, T]`` of all tokens."""
    actions = torch.tensor(route)[list(etd.routed_layers), None]
    return actions.expand(-1, row["input_ids"].shape[1])


def _visits(actions: Tensor, etd: ETDConfig) -> float:
    """Mean number of layers along actions ``[draws, R, T]``."""
    return etd.n_layers - actions.shape[1] + float(actions.double().sum(1).mean())


@torch.no_grad()
def _scores(
    model: MullForCausalLM, row: Mapping[str, Tensor], actions: Sequence[Tensor], batch_size: int
) -> Iterator[Score]:
    """How the model answers one question along each of the actions ``[R, T]``; equal ones run once."""
    etd = model.etd_config
    assert etd is not None, "checked before"
    stacked = torch.stack([each.to(model.device) for each in actions])
    distinct, place = stacked.unique(dim=0, return_inverse=True)
    found: list[Score] = []
    for part in distinct.split(batch_size):
        ids, labels = (row[name].to(model.device).expand(len(part), -1) for name in ("input_ids", "labels"))
        masks: dict[Visit, Tensor | bool] = {}
        for layer, of_layer in zip(etd.routed_layers, part.unbind(1), strict=True):
            for occurrence, runs in enumerate((of_layer != SKIP, of_layer == REPEAT)):
                masks[Visit(layer, occurrence)] = runs if bool(runs.any() ^ runs.all()) else bool(runs.all())
        policy = GivenTokens(masks, etd.stop)
        states = model.model(ids, path=etd.path(1), policy=policy, use_cache=False).last_hidden_state
        targets = targets_of(labels, None, 1)[..., 0]
        rows = Rows(ids, None, targets, [range(index, index + 1) for index in range(len(part))])
        found += rows.scores(model.lm_head(states[targets != IGNORED]))
    return (found[index] for index in place.tolist())


def _cost(scores: Sequence[Sequence[Score]], plain: Sequence[Sequence[Score]], visits: Sequence[float]) -> DecisionCost:
    """Means over questions, and over draws before."""
    losses, base = (
        torch.tensor([sum(score.loss for score in draws) / len(draws) for draws in each], dtype=torch.float64)
        for each in (scores, plain)
    )
    counts = torch.tensor([draws[0].n_tokens for draws in scores], dtype=torch.float64)
    change, error = mean_and_error(counts * (losses - base), counts)
    correct = [sum(score.correct for score in draws) / len(draws) for draws in scores]
    return DecisionCost(
        visits=sum(visits) / len(visits),
        loss=float((counts * losses).sum() / counts.sum()),
        change=float(change),
        standard_error=float(error),
        correct=sum(correct) / len(correct),
    )
