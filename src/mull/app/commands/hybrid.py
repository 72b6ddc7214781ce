"""``mull convert`` and ``mull layers``: what they read, measure and print."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from typer import Argument, Option

from mull.app.commands.shared import ModelArgument, held_out, print_table, rows_of, teacher
from mull.data.corpus import load_stdlib
from mull.data.packing import PackedDataset
from mull.data.retrieval import Retrieval, retrieval_task
from mull.data.sources import load_documents
from mull.evaluation.divergence import step_zero
from mull.evaluation.search.layer_choice import UNITS, LayerChoice, Method, choose_layers
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts
from mull.retrofit.convert import Coverage, check_conversion, convert_checkpoint, engine_notes
from mull.retrofit.hybrid import CrossArchTransferConfig, DeltaStart, HybridAttentionConfig
from mull.retrofit.reading import read_config
from mull.runtime.storage import local_path
from mull.training.loop import MAX_SEED

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CALIBRATION_LENGTH = 1024
"""Most tokens of a row to calibrate on: half-lives are shorter than rows."""

CALIBRATION_TOKENS = 16_384
CALIBRATION_BATCH = 2

JUDGED_ROWS = 8
"""Rows on which a calibrated start is measured."""


def parse_layers(pattern: str | None, layers: str | None) -> HybridAttentionConfig:
    """Which layers become DeltaNet, from the options of ``mull convert``.

    Raises:
        ValueError: both are given, or one cannot be read.
    """
    if pattern is not None and layers is not None:
        raise ValueError("Give --pattern or --layers, not both.")
    if layers is not None and layers.endswith(".json"):
        try:
            choice = LayerChoice.model_validate_json(Path(layers).read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{layers} is no choice of layers: give the file that mull layers has written.") from None
        return HybridAttentionConfig(layers=choice.deltanet)
    if layers is not None:
        if not _are_numbers(layers.split(",")):
            raise ValueError(f"--layers {layers} must be numbers of layers, such as 0,1,2,4, or a file of mull layers.")
        return HybridAttentionConfig(layers=tuple(map(int, layers.split(","))))
    if pattern == "none":
        return HybridAttentionConfig(deltanet_layer_pattern=())
    places, _, period = (pattern or "0,1,2/4").partition("/")
    if not _are_numbers([*places.split(","), period]):
        raise ValueError(f"--pattern {pattern} must be places and a period, such as 0,1,2/4, or none.")
    return HybridAttentionConfig(deltanet_layer_pattern=tuple(map(int, places.split(","))), pattern_period=int(period))


def _are_numbers(texts: Sequence[str]) -> bool:
    return all(text.strip().isascii() and text.strip().isdecimal() for text in texts)


def full_rows(dataset: PackedDataset) -> Tensor:
    """Rows ``[N, T]`` without padding, which only the last one can have.

    Raises:
        ValueError: none is left.
    """
    if len(dataset) < 2:
        raise ValueError(
            f"The text fills less than two rows of {dataset.input_ids.shape[1]} tokens: give more text, or shorter rows."
        )
    return dataset.input_ids[:-1]


def calibrated(
    model: Any, rows: Tensor, layers: Collection[int], config: CalibrationConfig | None = None
) -> dict[int, DeltaStart]:
    """Starts of these layers, from the first `CALIBRATION_TOKENS` of the rows."""
    n_rows = max(1, CALIBRATION_TOKENS // rows.shape[1])
    return calibrate_starts(model, list(rows[:n_rows].split(CALIBRATION_BATCH)), layers, config)


def print_step_zero(model: Any, rows: Tensor, starts: Mapping[int, DeltaStart]) -> None:
    """What the hybrid loses with these starts, on the `JUDGED_ROWS` that follow those of the calibration."""
    used = max(1, CALIBRATION_TOKENS // rows.shape[1])
    held_out = rows[used : used + JUDGED_ROWS]
    if not len(held_out):
        print(f"The calibration took all {len(rows)} rows of the text, so none is left to measure the divergence on.")
    if not starts or not len(held_out):
        return
    print(
        f"KL(source || hybrid) in nats per token before any training, on {len(held_out)} rows after the calibration's:"
    )
    found = step_zero(model, list(held_out.split(CALIBRATION_BATCH)), {"calibrated": starts})
    errors = ("" if row.standard_error is None else row.standard_error for row in found)
    values = ((row.start, row.divergence, error) for row, error in zip(found, errors, strict=True))
    print_table([("start", "divergence", "standard error"), *values])


def measure_layers(
    model: Any, n_keep: int, method: Method, calibration: Tensor, text: Tensor, *, n_keys: int, seed: int
) -> LayerChoice:
    """Calibrate every layer by itself on one part of the text, and score it on the other.

    Retrieval tasks are half needles, half tasks of `n_keys` facts; there are as many as rows.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    starts = calibrated(model, calibration, range(n_layers), CalibrationConfig(sequential=False))
    tasks = None
    if method == "retrieval":
        halves = [
            retrieval_task(text, len(text[half::2]), keys, seed=seed + half)
            for half, keys in enumerate((1, n_keys))
            if len(text[half::2])
        ]
        tasks = Retrieval(torch.cat([half.input_ids for half in halves]), torch.cat([half.answers for half in halves]))
    return choose_layers(model, n_keep, method, starts=starts, rows=text, tasks=tasks, seed=seed)


def print_choice(choice: LayerChoice) -> None:
    """Scores, and what follows from them."""
    if choice.scores:
        scores = ((s.layer, s.score, s.low, s.high, "stays" if s.layer in choice.keep else "") for s in choice.scores)
        print_table([("layer", f"score ({UNITS[choice.method]})", "95 % from", "to", ""), *scores])
    if choice.accuracy is not None:
        print(f"The model itself answers {choice.accuracy:.0%} of {choice.n_examples} retrieval tasks.")
    print(choice.verdict)
    print(f"Attention stays in {_listed(choice.keep)}: mull convert --layers {_listed(choice.deltanet)}")


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))


def print_conversion(coverage: Coverage, place: Path) -> None:
    """How much of the hybrid was copied, derived and is fresh, which norms lost something, and what to know of the result."""
    config = read_config(str(place))
    chosen = [number for number, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    counts = coverage.counts()
    rows = [(origin, f"{n:,}", f"{parameters:,}") for origin, (n, parameters) in counts.items()]
    print_table([("tensors of the hybrid", "tensors", "parameters"), *rows])
    print(f"All {len(coverage.used):,} tensors of the source were used, each once.")
    if coverage.ignored:
        print(
            f"Besides, it has {len(coverage.ignored)} tensors of rotary frequencies, which follow from its configuration."
        )
    if rounded := coverage.rounded():
        worst = max(rounded, key=lambda name: rounded[name])
        print(f"{len(rounded)} norms have weights that were rounded, by at most {rounded[worst]:.2%} ({worst}).")
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


def convert(
    source: Annotated[str, Argument(help="Folder or hub name of a Qwen3 checkpoint.", metavar="SOURCE")],
    out: Annotated[str, Option(help="New folder for the hybrid.")],
    pattern: Annotated[
        str | None, Option(help="DeltaNet layers of each period, or none.", show_default="0,1,2/4")
    ] = None,
    layers: Annotated[str | None, Option(help="DeltaNet layers instead: 0,1,2,4, or a file of mull layers.")] = None,
    calibrate: Annotated[
        list[str] | None,
        Option(help="Text to calibrate them on, which loads the model: files, folders, s3://… or hf:…."),
    ] = None,
    fit: Annotated[
        Literal["ridge", "scale"],
        Option(help="Calibrated output maps: ridge fits them; scale, of one factor per head, changes less."),
    ] = "ridge",
    gate: Annotated[Literal["zero", "small", "ones"], Option(help="Start of the gates; zero is exact.")] = "zero",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, Option(help="Precision; default: the source's.")] = None,
) -> None:
    """Turn layers of a Qwen3 model into Gated DeltaNet. Interrupted, it continues when the command is repeated."""
    settings = CrossArchTransferConfig(hybrid_attention=parse_layers(pattern, layers), gate_init_strategy=gate)
    precision, starts = None if dtype is None else PRECISIONS[dtype], None
    if calibrate is not None:
        kinds = check_conversion(source, out, settings, precision)
        documents = load_documents(calibrate)
        loaded = teacher(source)
        length = min(CALIBRATION_LENGTH, loaded.config.get_text_config().max_position_embeddings)
        rows = full_rows(rows_of(documents, source, loaded, length))
        layers_found = [i for i, kind in enumerate(kinds) if kind == "linear_attention"]
        starts = calibrated(loaded, rows, layers_found, CalibrationConfig(output=fit))
        print_step_zero(loaded, rows, starts)
        del loaded
    coverage = convert_checkpoint(source, out, settings, dtype=precision, starts=starts)
    print_conversion(coverage, local_path(out))


def choose_softmax_layers(
    model: ModelArgument,
    keep: Annotated[int, Option(help="Layers that keep their attention.", min=1)],
    method: Annotated[
        Literal["uniform", "replace-one", "retrieval", "gate"], Option(help="What is measured of a layer.")
    ] = "retrieval",
    data: Annotated[list[str] | None, Option(help="Files, folders, s3://… or hf:…; default: Python's library.")] = None,
    out: Annotated[str, Option(help="File for the choice, which mull convert --layers reads.")] = "out/layers.json",
    length: Annotated[int, Option(help="Tokens per row.", min=8)] = 256,
    rows: Annotated[int, Option(help="Rows or retrieval tasks to measure on.", min=2)] = 64,
    keys: Annotated[int, Option(help="Facts in every other retrieval task.", min=1)] = 4,
    seed: Annotated[int, Option(help="Seed of tasks and resamples.", min=0, max=MAX_SEED)] = 0,
) -> None:
    """Choose which layers of MODEL keep their attention when the others become Gated DeltaNet, and say how sure that is."""
    place = local_path(out)
    documents = held_out(data)
    loaded = teacher(model)
    if method == "uniform":
        choice = choose_layers(loaded, keep, method)
    else:
        text = full_rows(rows_of(documents, model, loaded, length))
        # Text of the user's own is halved; of Python's library, other files are read.
        calibration = text[: len(text) // 2] if data else full_rows(rows_of(load_stdlib().train, model, loaded, length))
        measured = text[len(text) // 2 :][:rows] if data else text[:rows]
        choice = measure_layers(loaded, keep, method, calibration, measured, n_keys=keys, seed=seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(choice.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print_choice(choice)
    print(f"stored in {place}")
