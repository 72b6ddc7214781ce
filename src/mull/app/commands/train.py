"""``mull train``, ``mull schema`` and ``mull demo``."""

import json
import signal
from typing import Annotated

import typer
from typer import Argument, Option

from mull.app.commands.shared import print_once
from mull.app.demo.demo import run_demo
from mull.app.recipe import load_recipe, recipe_schema
from mull.app.run import estimate_recipe, run_recipe
from mull.runtime.storage import local_path
from mull.training.loop import CHECKPOINTS, MAX_SEED, losses_of


def demo(
    out: Annotated[str, Option(help="Folder for the report and the models.")] = "out/demo",
    seed: Annotated[int, Option(help="Seed of weights, data order and sampled iterations.", min=0, max=MAX_SEED)] = 0,
) -> None:
    """Train a small model on real text, teach it to think in loops, and write a report: minutes on one CPU, no downloads."""
    print(f"report: {run_demo(local_path(out), seed)}")


def train(
    recipe: Annotated[str, Argument(help="YAML file that describes the run.")],
    set_: Annotated[list[str] | None, Option("--set", help="section.key=value; overrides the recipe.")] = None,
    resume: Annotated[bool, Option(help="Continue from the run's newest checkpoint.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything and print the cost; train nothing.")] = False,
) -> None:
    """Train a model as a recipe describes. On several devices: torchrun --nproc-per-node N -m mull train RECIPE."""
    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        print_once(estimate_recipe(loaded))
        return
    folder = loaded.run.out / loaded.run.name
    checkpoints = loaded.checkpoint.url or folder / CHECKPOINTS
    try:
        result = run_recipe(loaded, resume)
    except KeyboardInterrupt:
        print_once(f"Interrupted. --resume continues from the newest checkpoint in {checkpoints}, if there is one.")
        raise typer.Exit(128 + signal.SIGINT) from None
    cost = f"{result.step} steps, {result.tokens} tokens, {result.seconds:.0f} s ({result.precision})"
    last = losses_of(result.history[-1]) if result.history else {}  # ranks that resumed a finished run have no records
    losses = "".join(f", {name} {value:.4f}" for name, value in last.items())
    print_once(f"{result.stopped} after {cost}{losses}: {folder}")
    written = WRITTEN if result.stopped == "finished" else {}
    for name, purpose in written.items():
        print_once(f"  {folder / name}: {purpose}")
    print_once(f"  {checkpoints}: what --resume continues from")


WRITTEN = {"model": "the trained model, for mull", "trunk": "the same without extra heads and loops, for transformers"}
"""What a finished run leaves in its folder."""


def schema() -> None:
    """Print the JSON schema of recipes, which lets editors complete and explain keys."""
    print(json.dumps(recipe_schema(), indent=2))
