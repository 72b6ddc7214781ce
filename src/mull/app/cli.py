"""The command ``mull``. A user's mistake ends it with one line and exit code 2, without a traceback."""

import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from pydantic import ValidationError
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging
from typer import Argument, Option

from mull.app.demo.demo import run_demo
from mull.app.recipe import load_recipe, recipe_schema, wrong_value
from mull.app.report.figures import angular_distance_figure, depth_figure
from mull.app.report.inspect_page import write_inspection
from mull.app.report.page import Report
from mull.app.run import estimate_recipe, run_recipe
from mull.data.corpus import load_stdlib
from mull.data.packing import PackedDataset, pack_texts
from mull.data.route_labels import load_route_rows
from mull.data.sources import Document, load_documents
from mull.data.tokenizer import TextEncoder
from mull.decoding.generate import GenerationStats, generate
from mull.evaluation.acceptance import acceptance_by_position, describe_call
from mull.evaluation.depth_trace import trace_depth
from mull.evaluation.search.calibration import calibrate
from mull.evaluation.search.route_report import report_routers
from mull.evaluation.search.route_scores import RouteTask, load_questions
from mull.evaluation.search.route_tree import RouteSearchConfig
from mull.evaluation.search.routes import best_route, label_questions
from mull.evaluation.search.split import SplitReport, find_split
from mull.model.configs import ETDConfig, HaltingConfig, MTPConfig
from mull.retrofit.convert import Coverage, convert_checkpoint, engine_notes
from mull.retrofit.hybrid import CrossArchTransferConfig, HybridAttentionConfig
from mull.retrofit.reading import read_config
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.distributed import device
from mull.runtime.storage import local_path, redact
from mull.training.loop import CHECKPOINTS, MAX_SEED, losses_of

TRACEBACK = "MULL_TRACEBACK"
"""Environment variable that shows the traceback of an error, for bug reports."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, Argument(help="Folder, .gguf file or hub name of a checkpoint.", metavar="MODEL")]


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


@app.command()
def demo(
    out: Annotated[str, Option(help="Folder for the report and the models.")] = "out/demo",
    seed: Annotated[int, Option(help="Seed of weights, data order and sampled iterations.", min=0, max=MAX_SEED)] = 0,
) -> None:
    """Train a small model on real text, teach it to think in loops, and write a report: minutes on one CPU, no downloads."""
    print(f"report: {run_demo(local_path(out), seed)}")


@app.command()
def train(
    recipe: Annotated[str, Argument(help="YAML file that describes the run.")],
    set_: Annotated[list[str] | None, Option("--set", help="section.key=value; overrides the recipe.")] = None,
    resume: Annotated[bool, Option(help="Continue from the run's newest checkpoint.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything and print the cost; train nothing.")] = False,
) -> None:
    """Train a model as a recipe describes. On several devices: torchrun --nproc-per-node N -m mull train RECIPE."""
    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        _print_once(estimate_recipe(loaded))
        return
    result = run_recipe(loaded, resume)
    folder = loaded.run.out / loaded.run.name
    cost = f"{result.step} steps, {result.tokens} tokens, {result.seconds:.0f} s ({result.precision})"
    last = losses_of(result.history[-1]) if result.history else {}  # ranks that resumed a finished run have no records
    losses = "".join(f", {name} {value:.4f}" for name, value in last.items())
    _print_once(f"{result.stopped} after {cost}{losses}: {folder}")
    written = WRITTEN if result.stopped == "finished" else {}
    for name, purpose in written.items():
        _print_once(f"  {folder / name}: {purpose}")
    _print_once(f"  {loaded.checkpoint.url or folder / CHECKPOINTS}: what --resume continues from")


WRITTEN = {"model": "the trained model, for mull", "trunk": "the same without extra heads and loops, for transformers"}
"""What a finished run leaves in its folder."""


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, which lets editors complete and explain keys."""
    print(json.dumps(recipe_schema(), indent=2))


def _print_once(text: str) -> None:
    """Print on rank 0 only; torchrun sets RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _held_out(data: list[str] | None) -> Sequence[Document]:
    """Text to measure a model on. It is read before the model, so that a wrong path is told at once."""
    return load_stdlib().held_out if data is None else load_documents(data)


def _rows(documents: Sequence[Document], name: str, model: Any, length: int) -> PackedDataset:
    """The text in tokens of the model that has this name."""
    config = model.config.get_text_config()
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length {length} exceeds the model's {config.max_position_embeddings} positions: measure shorter rows."
        )
    texts = (document.text for document in documents)
    return pack_texts(texts, load_tokenizer(name), length=length, vocab_size=config.vocab_size)


@app.command()
def split(
    model: ModelArgument,
    data: Annotated[list[str] | None, Option(help="Files, folders, s3://… or hf:…; default: Python's library.")] = None,
    out: Annotated[str, Option(help="Folder for split.json and split.html.")] = "out/split",
    length: Annotated[int, Option(help="Tokens per row.", min=2)] = 128,
    batches: Annotated[int, Option(help="Number of batches to measure on.", min=1)] = 16,
    batch_size: Annotated[int, Option(help="Rows per batch; windows may drop out after each batch.", min=1)] = 4,
    probe_batches: Annotated[int, Option(help="At most so many of them for the loop probe; 0: no probe.", min=0)] = 8,
    width: Annotated[
        list[int] | None, Option(help="Layers of the probed windows; default: the published width and its half.")
    ] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], Option(help="auto takes the faster one.")] = "auto",
) -> None:
    """Measure which layers of MODEL encode, think and decode, and propose an ETDConfig."""
    folder = local_path(out)
    documents = _held_out(data)
    loaded: Any = from_pretrained(model, allow_missing=False)
    dataset = _rows(documents, model, loaded, length)
    measured = list(dataset.in_order(batch_size))[:batches]
    report = find_split(
        loaded.to(device()),
        measured.__getitem__,
        n_batches=len(measured),
        n_probe_batches=min(probe_batches, len(measured)),
        probe_widths=width,
        precision=precision,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "split.json").write_text(report.to_json())
    page = Report(f"Split of {model}", command=" ".join(["mull", *sys.argv[1:]]))
    section = page.section("Loop probe and angular distance").prose(_describe(report))
    section.figure(angular_distance_figure(report), "Angular distance of each layer, and the loop probe.")
    if report.probe:
        section.table(PROBE_COLUMNS, _probe_rows(report), "Losses in nats per token. All windows are in split.json.")
    page.write(folder / "split.html")
    _print_split(report)
    print(f"figure: {folder / 'split.html'}")


@app.command("calibrate")
def calibrate_depth(
    model: ModelArgument,
    data: Annotated[list[str] | None, Option(help="Files, folders, s3://… or hf:…; default: Python's library.")] = None,
    target_iterations: Annotated[float | None, Option(help="Mean think iterations of a token.")] = None,
    tolerance: Annotated[float | None, Option(help="Nats that the loss may rise above that of all iterations.")] = None,
    rule: Annotated[str, Option(help="state, confidence, kl, repeat or learned.")] = "state",
    iterations: Annotated[int | None, Option(help="Most think iterations; default: the model's own.")] = None,
    stop: Annotated[
        Literal["last_kv", "own_state", "active_only", "share_first"] | None,
        Option(help="What a stopped token leaves behind; default: the model's own."),
    ] = None,
    length: Annotated[int, Option(help="Tokens per row.", min=2)] = 256,
    rows: Annotated[int, Option(help="Held-out rows to measure on.", min=1)] = 32,
    out: Annotated[str, Option(help="Folder for calibration.json and calibration.html.")] = "out/calibration",
) -> None:
    """Find the threshold at which tokens of MODEL stop thinking, and store it in the model's folder."""
    place, folder, documents = local_path(model), local_path(out), _held_out(data)
    loaded: Any = from_pretrained(model, allow_missing=False)
    found = calibrate(
        loaded.to(device()),
        _rows(documents, model, loaded, length),
        rule=rule,
        iterations=iterations,
        target_iterations=target_iterations,
        tolerance=tolerance,
        stop=stop,
        max_rows=rows,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(found.model_dump_json(indent=1))
    table = [tuple(point.model_dump().values()) for point in found.curve]
    page = Report(f"Depth of {model}", command=" ".join(["mull", *sys.argv[1:]]))
    section = page.section("Loss against executed layers")
    section.figure(depth_figure(found.curve), "Loss against the mean number of layers that a token runs.")
    section.table(DEPTH_COLUMNS, table, f"{found.n_targets} targets; nats per token.")
    page.write(folder / "calibration.html")
    for row in [DEPTH_COLUMNS, *table]:
        print(*(f"{cell:.5g}".rjust(12) if isinstance(cell, float) else f"{cell or '':>12}" for cell in row), sep="")
    chosen, halting = found.chosen, found.halting
    print(f"chosen: {halting.rule} at {halting.limit:.6g}: {chosen.iterations:.2f} iterations, loss {chosen.loss:.4f}")
    print(f"The same depths shuffled among the tokens: loss {found.shuffled.loss:.4f}")
    if chosen.loss >= found.shuffled.loss and halting.rule == rule:
        print("So the rule does not find the tokens that need depth. It saves compute and nothing else.")
    if isinstance(loaded.config.etd, dict) and (place / "config.json").is_file():
        loaded.config.etd |= {"adaptive_depth": True, "confidence_threshold": None, "halting": halting.model_dump()}
        loaded.config.save_pretrained(place)
        print(f"stored in {place / 'config.json'}")


DEPTH_COLUMNS = ("rule", "threshold", "iterations", "layers", "readouts", "loss")
"""Of a calibration: means per token; `DepthPoint` says more."""


PROBE_COLUMNS = ("layers", "extra loss", "standard error", "per layer", "rows", "dropped")
"""What is shown of a probed window; losses in nats per token."""

SHOWN_WINDOWS = 15


def _probe_rows(report: SplitReport) -> list[tuple[str, float, float | None, float, int, str]]:
    """The windows that cost least per layer; those that dropped out come last."""
    order = sorted(report.probe, key=lambda cost: (cost.dropped, cost.per_layer))[:SHOWN_WINDOWS]
    return [
        (f"{c.start}-{c.stop - 1}", c.extra_loss, c.standard_error, c.per_layer, c.n_rows, "yes" if c.dropped else "")
        for c in order
    ]


def _print_split(report: SplitReport) -> None:
    """The measurements, and what follows from them."""
    for layer, distance in enumerate(report.distances):
        print(f"layer {layer:3d}  distance {distance:.4f}")
    for row in [PROBE_COLUMNS, *_probe_rows(report)] if report.probe else []:
        print(*(f"{cell:.4f}".rjust(15) if isinstance(cell, float) else f"{cell or '':>15}" for cell in row), sep="")
    print(_describe(report))
    etd = report.etd
    encoder, think, decoder = etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers
    print(
        f"That is: {encoder} layers encode, {think} think, k times, and {decoder} decode. In mull generate --etd "
        f"{encoder},{think},{decoder}; in a recipe model.etd: {{n_encoder_layers: {encoder}, n_think_layers: {think}, "
        f"n_decoder_layers: {decoder}}}; in Python {etd!r}."
    )


def _describe(report: SplitReport) -> str:
    etd = report.etd
    return (
        f"Proposed split {etd.n_encoder_layers}-{etd.n_think_layers}*k-{etd.n_decoder_layers} by {report.method}, measured on "
        f"{report.n_tokens} tokens in {report.n_batches} batches: {report.n_passes:.0f} passes in {report.precision}, "
        f"{report.seconds:.0f} s. {' '.join(report.notes)}"
    )


@app.command()
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
    _print_table(rows)
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
    _print_table(table)
    print(
        f"{found.n_questions} questions: macro-F1 {found.agreement.macro_f1:.4f}, accuracy {found.agreement.accuracy:.4f}"
    )
    rows_of = ((name, c.visits, c.loss, c.change, c.standard_error, c.correct) for name, c in found.costs.items())
    _print_table([("route", "visits", "loss", "change", "standard error", "right"), *rows_of])
    print(f"Written to {place}.")


def _print_table(rows: Sequence[Sequence[Any]]) -> None:
    for row in rows:
        print(*(f"{cell:.4f}".rjust(21) if isinstance(cell, float) else f"{cell:>21}" for cell in row), sep="")


@app.command()
def convert(
    source: Annotated[str, Argument(help="Folder or hub name of a Qwen3 checkpoint.", metavar="SOURCE")],
    out: Annotated[str, Option(help="New folder for the hybrid.")],
    pattern: Annotated[
        str | None, Option(help="DeltaNet layers of each period, or none.", show_default="0,1,2/4")
    ] = None,
    layers: Annotated[str | None, Option(help="Numbers of the DeltaNet layers instead: 0,1,2,4.")] = None,
    gate: Annotated[Literal["zero", "small", "ones"], Option(help="Start of the gates; zero is exact.")] = "zero",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, Option(help="Precision; default: the source's.")] = None,
) -> None:
    """Turn layers of a Qwen3 model into Gated DeltaNet. Interrupted, it continues when the command is repeated."""
    settings = CrossArchTransferConfig(hybrid_attention=_parse_layers(pattern, layers), gate_init_strategy=gate)
    coverage = convert_checkpoint(source, out, settings, dtype=None if dtype is None else PRECISIONS[dtype])
    place = local_path(out)
    config = read_config(str(place))
    chosen = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    _print_coverage(coverage)
    print(
        f"{len(chosen)} of {len(config.layer_types)} layers are Gated DeltaNet: {', '.join(map(str, chosen)) or 'none'}."
    )
    for note in engine_notes(config):
        print(note)
    if chosen:
        print("They only approximate the attention that they replace: train the model before you use it.")
    else:
        print("The model computes what its source does.")
    print(f"Written to {place}.")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parse_layers(pattern: str | None, layers: str | None) -> HybridAttentionConfig:
    if pattern is not None and layers is not None:
        raise ValueError("Give --pattern or --layers, not both.")
    if layers is not None:
        if not all(number.strip().isdigit() for number in layers.split(",")):
            raise ValueError(f"--layers {layers} must be numbers of layers, such as 0,1,2,4.")
        return HybridAttentionConfig(layers=tuple(map(int, layers.split(","))))
    if pattern == "none":
        return HybridAttentionConfig(deltanet_layer_pattern=())
    places, _, period = (pattern or "0,1,2/4").partition("/")
    if not all(number.strip().isdigit() for number in (*places.split(","), period)):
        raise ValueError(f"--pattern {pattern} must be places and a period, such as 0,1,2/4, or none.")
    return HybridAttentionConfig(deltanet_layer_pattern=tuple(map(int, places.split(","))), pattern_period=int(period))


def _print_coverage(coverage: Coverage) -> None:
    """How much of the hybrid was copied, derived and is fresh, and which norms lost something."""
    counts = coverage.counts()
    rows = [(origin, f"{n:,}", f"{parameters:,}") for origin, (n, parameters) in counts.items()]
    _print_table([("tensors of the hybrid", "tensors", "parameters"), *rows])
    print(f"All {len(coverage.used):,} tensors of the source were used, each once.")
    if rounded := coverage.rounded():
        worst = max(rounded, key=lambda name: rounded[name])
        print(f"{len(rounded)} norms have weights that were rounded, by at most {rounded[worst]:.2%} ({worst}).")


@app.command("generate")
def continue_prompt(
    model: ModelArgument,
    prompt: Annotated[str, Option(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, Option(help="Largest number of tokens to generate.")] = 100,
    think_iterations: Annotated[int | None, Option(help="Passes through the think block.")] = None,
    etd: Annotated[str | None, Option(help="Encoder, think and decoder layers of a base checkpoint: 7,4,5.")] = None,
    mtp: Annotated[Literal["native"] | None, Option(help="Use the heads that Qwen3-Next and Qwen3.5 have.")] = None,
    draft: Annotated[Literal["mtp"] | None, Option(help="Draft with the model's heads; same text.")] = None,
    draft_length: Annotated[int | None, Option(help="Tokens to draft per round; default: adaptive.")] = None,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from the likeliest tokens of this total probability.")] = None,
    min_p: Annotated[float | None, Option(help="Least probability, relative to the likeliest token's.")] = None,
    repetition_penalty: Annotated[float, Option(help="Divides the logits of used tokens; 1 is off.")] = 1.0,
    seed: Annotated[int, Option(help="Seed for sampling.", min=0, max=2**63 - 1)] = 0,
    compile_: Annotated[bool, Option("--compile", help="Compile: a minute at first, then faster.")] = False,
    compile_max: Annotated[
        bool, Option("--compile-max", help="Compile with packed weights: minutes, then fastest.")
    ] = False,
    adaptive: Annotated[
        bool | None, Option(help="Let tokens stop thinking early; default: as the model is stored.")
    ] = None,
    stats: Annotated[bool, Option("--stats", help="Print time and acceptance to standard error.")] = False,
) -> None:
    """Continue a prompt, printing tokens as they come."""
    text = sys.stdin.read() if prompt == "-" else prompt
    heads = None if mtp is None else MTPConfig(mtp_head_type=mtp)
    loaded: Any = from_pretrained(model, etd=None if etd is None else _parse_split(etd), mtp=heads, allow_missing=False)
    tokenizer = load_tokenizer(model)
    encoder = TextEncoder(tokenizer)
    tokens = encoder.prompts([text])
    if not tokens[0]:
        raise ValueError("The prompt is empty: give at least one token to continue.")
    known = loaded.lm_head.out_features
    if len(tokenizer) > known:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the model {known}: it belongs to another model.")
    output = generate(
        loaded.to(device()),
        torch.tensor(tokens),
        max_new_tokens=max_new_tokens,
        draft=draft,
        draft_length=draft_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        eos_token_id=encoder.ends(loaded.generation_config.eos_token_id),
        think_iterations=think_iterations,
        streamer=TextStreamer(tokenizer),
        adaptive=adaptive,
        compile="max" if compile_max else compile_,
    )
    if stats:
        print(_stats_text(output.stats), file=sys.stderr)


@app.command("inspect")
def inspect_depth(
    model: ModelArgument,
    prompt: Annotated[list[str], Option(help="Text to continue; one page for each.")],
    max_new_tokens: Annotated[int, Option(help="Tokens to write after the prompt.", min=1)] = 32,
    think_iterations: Annotated[int | None, Option(help="Most passes through the think block.")] = None,
    rule: Annotated[str | None, Option(help="Halting rule; default: the model's own.")] = None,
    threshold: Annotated[float | None, Option(help="Threshold of the rule.")] = None,
    draft: Annotated[Literal["mtp"] | None, Option(help="Draft with the model's heads; same text.")] = None,
    out: Annotated[str, Option(help="Folder for the pages.")] = "out/inspect",
) -> None:
    """Show how long each token of a text thinks: a page for each prompt."""
    loaded: Any = from_pretrained(model, allow_missing=False)
    tokenizer = load_tokenizer(model)
    encoder = TextEncoder(tokenizer)
    halting: HaltingConfig | bool = True
    if rule is not None or threshold is not None:
        own = None if loaded.etd_config is None else loaded.etd_config.halting_of(True)
        fields = {} if own is None else own.model_dump()
        changed = {"rule": rule, "threshold": threshold} if rule else {"threshold": threshold}
        halting = HaltingConfig(**fields | changed)
    for number, text in enumerate(prompt, start=1):
        tokens = torch.tensor(encoder.prompts([text]))
        rounds = Rounds()
        output = generate(
            loaded.to(device()),
            tokens,
            max_new_tokens=max_new_tokens,
            draft=draft,
            adaptive=halting,
            think_iterations=think_iterations,
            eos_token_id=encoder.ends(loaded.generation_config.eos_token_id),
            streamer=rounds,
        )
        rule_of_call = halting if isinstance(halting, HaltingConfig) else None
        trace = trace_depth(loaded, output.sequences, rule_of_call, think_iterations, tokens.shape[1])
        file = local_path(out) / f"{number}.html"
        write_inspection(
            trace,
            tokenizer,
            file,
            title=f"How long the tokens of {model} think",
            command=" ".join(["mull", *sys.argv[1:]]),
            n_prompt=tokens.shape[1],
            drafted=rounds.drafted,
        )
        print(f"{trace.mean_iterations:.2f} iterations on average, at most {trace.iterations}: {file}")


class Rounds:
    """A streamer that notes which tokens were drafted: all of a round but the last."""

    def __init__(self) -> None:
        self.drafted: list[bool] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then the tokens of each round."""
        first = not self.drafted
        self.drafted += [not first] * (len(value) - 1) + [False]

    def end(self) -> None:
        """Nothing follows."""


def _stats_text(stats: GenerationStats) -> str:
    """A call's statistics as lines, and a table of acceptance by position if it drafted."""
    facts = describe_call(stats)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    positions = acceptance_by_position([stats])
    if positions:
        lines += ["", f"{'position':>8}  {'drafted':>8}  {'tested':>8}  {'accepted':>8}  {'share':>6}"]
    for place, counts in enumerate(positions, start=1):
        drafted, verified, accepted = counts
        lines.append(f"{place:>8}  {drafted:>8}  {verified:>8}  {accepted:>8}  {counts.conditional:>6.1%}")
    return "\n".join(lines)


def _parse_split(text: str) -> ETDConfig:
    counts = text.split(",")
    if len(counts) != 3 or not all(count.strip().isdigit() for count in counts):
        raise ValueError(f"--etd {text} must be three numbers of layers, such as 7,4,5.")
    encoder, think, decoder = map(int, counts)
    return ETDConfig(n_encoder_layers=encoder, n_think_layers=think, n_decoder_layers=decoder)


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
