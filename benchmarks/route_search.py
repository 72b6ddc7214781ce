"""One fixed route for a pretrained model: the best layer to skip, the best to repeat, the best route within a budget of visits.

The measure is the teacher-forced loss of worked answers. Routes are chosen on one half of the questions and measured on the other
half, with the standard error over questions and a 95 % interval. Beside each stand random routes with as many skips and
repeats.

    python benchmarks/route_search.py MODEL QUESTIONS [--number 64] [--max-visits 28] [--out FILE]

QUESTIONS has a ``question`` and an ``answer`` in each line, as GSM8K does. Of a ``.txt`` file, pieces of 600 characters are taken
at equal distances; the second half of each is the answer.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race import header

import mull
from mull.data.sources import read_records
from mull.data.tokenizer import TextEncoder
from mull.evaluation.search.loop_probe import mean_and_error
from mull.evaluation.search.route_scores import Question, RouteTask, Score, SharedRuns
from mull.evaluation.search.route_tree import Route, RouteSearchConfig
from mull.evaluation.search.routes import BestRoute, RouteCost, best_route
from mull.retrofit.source import load_tokenizer

NORMAL = 1.96
"""Half width of a 95 % interval, in standard errors."""

N_OTHERS = 8

HALF = 300
"""Characters of a question and of an answer taken from text."""


def questions_of(path: str, number: int) -> list[Question]:
    """The questions of a file."""
    if not path.endswith(".txt"):
        records = [record.fields for record in read_records(path)][:number]
        return [Question(f"Question: {x['question']}\nAnswer:", f" {x['answer']}") for x in records]
    text = Path(path).read_text(encoding="utf-8")
    starts = range(0, len(text) - 2 * HALF, (len(text) - 2 * HALF) // number)[:number]
    return [Question(text[at : at + HALF], text[at + HALF : at + 2 * HALF]) for at in starts]


def compared(task: RouteTask, numbers: Sequence[int], routes: Sequence[Route], size: int) -> list[RouteCost]:
    """Routes against the plain one, on these questions."""
    plain = (1,) * len(task.model.model.layers)
    scores: list[list[Score]] = [[] for _ in (plain, *routes)]
    for start in range(0, len(numbers), size):
        runs = SharedRuns(task.model, task.rows(numbers[start : start + size]))
        for so_far, route in zip(scores, (plain, *routes), strict=True):
            so_far += runs.scores([route])[0]
    counts = torch.tensor([score.n_tokens for score in scores[0]], dtype=torch.float64)
    base, *others = (counts * torch.tensor([score.loss for score in of_route]) for of_route in scores)
    costs = []
    for route, sums, of_route in zip(routes, others, scores[1:], strict=True):
        mean, error = (float(x) for x in mean_and_error(sums - base, counts))
        loss, right = float(sums.sum() / counts.sum()), sum(score.correct for score in of_route) / len(of_route)
        costs.append(RouteCost(route=route, loss=loss, change=mean, standard_error=error, correct=right))
    return costs


def told(cost: RouteCost) -> dict[str, Any]:
    """A route with its interval."""
    interval = [cost.change - NORMAL * cost.standard_error, cost.change + NORMAL * cost.standard_error]
    return cost.model_dump() | {"visits": sum(cost.route), "interval": interval}


def single_edits(task: RouteTask, n_layers: int, action: int, size: int) -> dict[str, Any]:
    """The best route of one edit: chosen on one half of the questions, measured on the other, beside random other layers."""
    plain = (1,) * n_layers
    near: list[Route] = [(*plain[:layer], action, *plain[layer + 1 :]) for layer in range(n_layers)]
    numbers = range(len(task.questions))
    best = min(compared(task, numbers[::2], near, size), key=lambda cost: cost.loss).route
    others = [near[layer] for layer in np.random.default_rng(0).permutation(n_layers)[:N_OTHERS] if near[layer] != best]
    cost, *controls = compared(task, numbers[1::2], [best, *others], size)
    return {"layer": best.index(action), "best": told(cost), "controls": [told(control) for control in controls]}


def report(name: str, found: BestRoute) -> dict[str, Any]:
    """A search's result, printed and returned."""
    rows = [("found", found.found), *(("random", cost) for cost in found.controls)]
    for label, cost in rows:
        show(f"{name}: {label}", told(cost))
    return found.model_dump() | {"interval": told(found.found)["interval"]}


def show(name: str, cost: dict[str, Any]) -> None:
    low, high = cost["interval"]
    actions = "".join(map(str, cost["route"]))
    print(
        f"{name:<22}{cost['visits']:>4} visits  {cost['change']:>+8.4f} [{low:+.4f}, {high:+.4f}]  {actions}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", help="JSON lines with question and answer, or a text")
    parser.add_argument("--number", type=int, default=64, help="questions, half of them to choose and half to measure")
    parser.add_argument("--max-visits", type=int, default=28)
    parser.add_argument("--routes", type=int, default=400, help="most routes of each search")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    model: Any = mull.from_pretrained(given.model, dtype=torch.float32)
    questions = questions_of(given.questions, given.number)
    task = RouteTask(model.eval(), TextEncoder(load_tokenizer(given.model)), questions)
    config = RouteSearchConfig(scope="all", simulations=given.routes, batch_size=given.batch_size, seed=given.seed)
    n_layers, results = len(model.model.layers), {}
    for name, action in (("skip one", 0), ("repeat one", 2)):
        results[name] = single_edits(task, n_layers, action, given.batch_size)
        show(f"{name}: layer {results[name]['layer']}", results[name]["best"])
        for control in results[name]["controls"]:
            show(f"{name}: random", control)
    for method in ("greedy", "evolution"):
        found = best_route(task, method, config, given.max_visits)
        results[method] = report(method, found)
        print(
            f"{method}: {found.layers} layers of {found.layers_unshared}; plain loss {found.plain.loss:.4f}", flush=True
        )
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if given.out is not None:
        facts = header("cpu", n_questions=len(questions), max_visits=given.max_visits, seed=given.seed, seconds=seconds)
        given.out.write_text(json.dumps(facts | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
