"""``mull eval`` and ``mull sandbox doctor``."""

import shlex
import signal
import sys
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from mull.app.commands.shared import SplitOption, parse_split, print_once
from mull.app.evaluate import compare, run_evaluation
from mull.app.sandbox import sandbox_doctor
from mull.evaluation.suites.subject import MAX_SEED, Request


def evaluate(
    model: Annotated[
        str | None, Argument(help="Folder, .gguf file or hub name of a checkpoint.", metavar="MODEL")
    ] = None,
    suite: Annotated[
        list[str] | None, Option(help="humaneval, mbpp+, perplexity, lm_eval:TASK, …; several are allowed.")
    ] = None,
    out: Annotated[
        str, Option(help="Folder for samples and results; repeated, the command continues there.")
    ] = "out/eval",
    compare_: Annotated[
        tuple[str, str] | None,
        Option("--compare", help="Two such folders: compare their models instead.", metavar="A B"),
    ] = None,
    samples: Annotated[int | None, Option(help="Answers per problem.")] = None,
    temperature: Annotated[
        list[float] | None, Option(help="0 is greedy; of several, the maximum is an oracle's.")
    ] = None,
    k: Annotated[list[int] | None, Option("--k", help="Of pass@k.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from the likeliest tokens of this total probability.")] = None,
    top_k: Annotated[int | None, Option(help="Sample from the k most likely tokens.")] = None,
    min_p: Annotated[float | None, Option(help="Least probability, relative to the likeliest token's.")] = None,
    repetition_penalty: Annotated[float, Option(help="Divides the logits of used tokens; 1 is off.")] = 1.0,
    max_new_tokens: Annotated[int | None, Option(help="Largest number of tokens of an answer.")] = None,
    limit: Annotated[int | None, Option(help="Only the first so many problems or, of texts, documents.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows at a time; 8, and 1 for inference-speed.")] = None,
    chat: Annotated[bool | None, Option(help="Use the chat template; default: if there is one.")] = None,
    draft_length: Annotated[int | None, Option(help="Drafts per round; 0 for none.")] = None,
    etd: SplitOption = None,
    mtp: Annotated[Literal["native"] | None, Option(help="Use the heads that Qwen3-Next and Qwen3.5 have.")] = None,
    think_iterations: Annotated[int | None, Option(help="Passes through the think block.")] = None,
    adaptive: Annotated[bool | None, Option(help="Let tokens stop thinking early; default: as stored.")] = None,
    layers: Annotated[str | None, Option(help="Layers to run instead, in order: 0,1,2,2,3.")] = None,
    engine: Annotated[Literal["mull", "transformers"] | None, Option(help="What writes answers.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, Option(help="Precision; default: the checkpoint's.")
    ] = None,
    compiled: Annotated[bool, Option(help="Also measure compiled decoding in inference-speed: minutes.")] = True,
    data: Annotated[
        list[str] | None, Option(help="SUITE=SOURCE, or text=SOURCE: file, folder, s3://… or hf:….")
    ] = None,
    length: Annotated[int | None, Option(help="Tokens of a row of text.")] = None,
    workers: Annotated[int, Option(help="Programs that run at a time.")] = 4,
    allow_weak_sandbox: Annotated[
        list[str] | None, Option(help="Layer of the sandbox that may be missing; see mull sandbox doctor.")
    ] = None,
    mlflow: Annotated[
        str | None, Option(help="Database or server that gets the scores, too; '' for a file in --out.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of answers and intervals.", min=0, max=MAX_SEED)] = 0,
) -> None:
    """Evaluate MODEL on suites. On several devices: torchrun --nproc-per-node N -m mull eval MODEL."""
    if compare_ is not None:
        if model is not None or suite:
            raise ValueError("Give MODEL and --suite to evaluate a model, or --compare A B for two results.")
        compare(*compare_, seed=seed)
        return
    if model is None:
        raise ValueError("Give MODEL and --suite to evaluate a model, or --compare A B for two results.")
    given = {
        "samples": samples,
        "temperatures": tuple(temperature) if temperature else None,
        "k": tuple(k) if k else None,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "batch_size": batch_size,
        "chat": chat,
        "draft_length": draft_length,
        "etd": None if etd is None else parse_split(etd),
        "mtp": mtp,
        "think_iterations": think_iterations,
        "adaptive": adaptive,
        "layers": None if layers is None else _layers(layers),
        "engine": engine,
        "compiled": compiled,
        "dtype": dtype,
        "data": dict(_assigned(entry) for entry in data or []),
        "length": length,
        "workers": workers,
        "allow_weak": tuple(allow_weak_sandbox or ()),
        "seed": seed,
    }
    request = Request.model_validate({name: value for name, value in given.items() if value is not None})
    try:
        run_evaluation(model, suite or [], out, request, mlflow=mlflow, command=shlex.join(["mull", *sys.argv[1:]]))
    except KeyboardInterrupt:
        print_once(f"Interrupted. The same command continues in {out}.")
        raise typer.Exit(128 + signal.SIGINT) from None


def _assigned(entry: str) -> tuple[str, str]:
    name, equals, source = entry.partition("=")
    if not name or not equals or not source:
        raise ValueError(f"--data {entry} must name a suite and a source, such as humaneval=HumanEval.jsonl.")
    return name, source


def _layers(text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ValueError(f"--layers {text} must be numbers of layers, such as 0,1,2,2,3.")
    return tuple(map(int, numbers))


def doctor(
    allow_weak_sandbox: Annotated[list[str] | None, Option(help="Layer that may be missing.")] = None,
) -> None:
    """Test each layer of the sandbox for generated programs on a live container; exit code 1 if one is missing."""
    if not sandbox_doctor(allow_weak_sandbox or ()):
        raise typer.Exit(1)
