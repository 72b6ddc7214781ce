"""``mull routes``: layers to skip or repeat."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from typer import Option

from mull.app.commands.shared import ModelArgument, print_table
from mull.data.route_labels import load_route_rows
from mull.data.tokenizer import TextEncoder
from mull.evaluation.search.route_report import report_routers
from mull.evaluation.search.route_scores import RouteTask, load_questions
from mull.evaluation.search.route_tree import RouteSearchConfig
from mull.evaluation.search.routes import best_route, label_questions
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.distributed import device
from mull.runtime.storage import local_path
from mull.training.loop import MAX_SEED


def routes(
    model: ModelArgument,
    task: Annotated[str | None, Option(help="arithmetic, or .jsonl: prompt, and answer or choices and label.")] = None,
    report: Annotated[
        str | None, Option(help="Measure routers on this file of labels; reads max-examples and batch-size.")
    ] = None,
    out: Annotated[str | None, Option(help="File of labels, route or report.", show_default="out/routes/…")] = None,
    scope: Annotated[Literal["think", "all"], Option(help="Layers to route; without a think block, all.")] = "think",
    labeller: Annotated[Literal["checker", "loss"], Option(help="What makes a route correct.")] = "checker",
    simulations: Annotated[int | None, Option(help="Per question (50); routes to run (300).", min=1)] = None,
    max_examples: Annotated[int | None, Option(help="Only the first so many questions.", min=1)] = None,
    batch_size: Annotated[int, Option(help="Routes in flight; of --corpus: questions per batch.", min=1)] = 8,
    end: Annotated[bool, Option("--end", help="The end of the text belongs to an answer.")] = False,
    corpus: Annotated[Literal["greedy", "evolution"] | None, Option(help="One route for all questions.")] = None,
    max_visits: Annotated[int | None, Option(help="Most layers that this runs; default: the model's.", min=1)] = None,
    seed: Annotated[int, Option(help="Seed of the search and of generated questions.", min=0, max=MAX_SEED)] = 0,
) -> None:
    """Search layers of MODEL to skip or repeat, for each question of a task, or once for all; or measure its routers."""
    if (task is None) == (report is None):
        raise ValueError("Give --task to search routes, or --report to measure routers on labels.")
    name = "report.json" if report else "route.json" if corpus else "labels.jsonl"
    place = local_path(out or f"out/routes/{name}")
    place.parent.mkdir(parents=True, exist_ok=True)
    loaded: Any = from_pretrained(model, allow_missing=False)
    loaded = loaded.to(device())
    if task is None:
        assert report is not None, "checked above"
        _report_routers(loaded, model, report, place, max_examples, batch_size)
        return
    questions = load_questions(task, max_examples, seed)
    asked = RouteTask(loaded, TextEncoder(load_tokenizer(model)), questions, end)
    settings = {"labeller": labeller, "scope": scope, "batch_size": batch_size, "seed": seed}
    config = RouteSearchConfig.model_validate(settings | {"simulations": simulations or (300 if corpus else 50)})
    if corpus is None:
        labels = label_questions(asked, place, config)
        right = [label for label in labels if label.correct]
        rows: Any = [("questions", "right", "of these plain right", "mean visits")]
        visits = sum(label.visits for label in right) / max(len(right), 1)
        rows.append((len(labels), len(right), sum(label.base_correct for label in right), visits))
        ran, alone = sum(label.layers for label in labels), sum(label.layers_unshared for label in labels)
        following = "train routers on the labels (train.algo: routing)"
    else:
        found = best_route(asked, corpus, config, max_visits)
        place.write_text(found.model_dump_json(indent=1))
        named = [("plain", found.plain), (corpus, found.found), *(("random", cost) for cost in found.controls)]
        rows = [("route", "visits", "loss", "change", "standard error", "right")]
        rows += [(name, sum(c.route), c.loss, c.change, c.standard_error, c.correct) for name, c in named]
        ran, alone = found.layers, found.layers_unshared
        following = f"model(..., path=mull.from_actions({list(found.found.route)}))"
    print_table(rows)
    print(f"The search ran {ran:,} layers instead of {alone:,}, as routes share their beginnings. Written to {place}.")
    print(f"Next: {following}.")


def _report_routers(
    loaded: Any, model: str, labels: str, place: Path, max_examples: int | None, batch_size: int
) -> None:
    """Measure routers on the labels of a file."""
    longest = loaded.config.get_text_config().max_position_embeddings
    rows = load_route_rows([labels], load_tokenizer(model), length=longest)
    if max_examples is not None:
        rows = rows.part(torch.arange(min(max_examples, len(rows))))
    found = report_routers(loaded.eval(), rows, batch_size=batch_size)
    place.write_text(found.model_dump_json(indent=1))
    table: list[tuple[Any, ...]] = [("label", "decided skip", "execute", "repeat")]
    table += [(name, *row) for name, row in zip(("skip", "execute", "repeat"), found.agreement.confusion, strict=True)]
    print_table(table)
    print(
        f"{found.n_questions} questions: macro-F1 {found.agreement.macro_f1:.4f}, accuracy {found.agreement.accuracy:.4f}"
    )
    rows_of = ((name, c.visits, c.loss, c.change, c.standard_error, c.correct) for name, c in found.costs.items())
    print_table([("route", "visits", "loss", "change", "standard error", "right"), *rows_of])
    print(f"Written to {place}.")
