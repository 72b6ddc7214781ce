"""The command ``mull``. A user's mistake ends it with one line and exit code 2, without a traceback."""

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import torch
import transformers
import typer
from pydantic import ValidationError
from transformers.utils import logging as transformers_logging
from typer import Option

from mull.app.commands.depth import calibrate_depth, inspect_depth, split
from mull.app.commands.evaluate import doctor, evaluate
from mull.app.commands.generate import continue_prompt
from mull.app.commands.hybrid import choose_softmax_layers, convert
from mull.app.commands.routes import routes
from mull.app.commands.train import demo, schema, train
from mull.app.recipe import wrong_value
from mull.runtime.storage import redact

TRACEBACK = "MULL_TRACEBACK"
"""Environment variable that shows the traceback of an error, for bug reports."""


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mull {metadata.version('mull')}, torch {torch.__version__}, transformers {transformers.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Print the versions and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Retrofit pretrained decoder language models."""


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "schema": schema,
    "split": split,
    "calibrate": calibrate_depth,
    "routes": routes,
    "convert": convert,
    "layers": choose_softmax_layers,
    "generate": continue_prompt,
    "inspect": inspect_depth,
    "eval": evaluate,
}
"""Verb to what it runs; an option or an argument is a parameter."""

for verb, command in COMMANDS.items():
    app.command(verb)(command)

sandbox = typer.Typer(no_args_is_help=True, help="The sandbox in which mull eval runs generated programs.")
sandbox.command("doctor")(doctor)
app.add_typer(sandbox, name="sandbox")


def main() -> None:
    """Entry point of the command."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get(TRACEBACK):
            raise
        verb = sys.argv[1] if len(sys.argv) > 1 else ""
        rank = os.environ.get("RANK", "0")
        who = f"mull {verb}" if rank == "0" else f"mull {verb} (rank {rank})"
        print(redact(f"{who}: {' '.join(_message(error).split())}"), file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    """What an error says. An error of a configuration names each refused value and the reason."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(wrong_value(mistake, ".".join(map(str, mistake["loc"]))) for mistake in error.errors())
