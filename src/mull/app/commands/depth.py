"""``mull split``, ``mull calibrate`` and ``mull inspect``: what a model does with its depth."""

import sys
from typing import Annotated, Any, Literal

import torch
from typer import Option

from mull.app.commands.shared import ModelArgument, held_out, rows_of
from mull.app.report.figures import angular_distance_figure, depth_figure
from mull.app.report.inspect_page import write_inspection
from mull.app.report.page import Report
from mull.data.tokenizer import TextEncoder
from mull.decoding.generate import generate
from mull.evaluation.depth_trace import trace_depth
from mull.evaluation.search.calibration import calibrate
from mull.evaluation.search.split import SplitReport, find_split
from mull.model.configs import HaltingConfig
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.distributed import device
from mull.runtime.storage import local_path


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
    documents = held_out(data)
    loaded: Any = from_pretrained(model, allow_missing=False)
    dataset = rows_of(documents, model, loaded, length)
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
    place, folder, documents = local_path(model), local_path(out), held_out(data)
    loaded: Any = from_pretrained(model, allow_missing=False)
    found = calibrate(
        loaded.to(device()),
        rows_of(documents, model, loaded, length),
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
