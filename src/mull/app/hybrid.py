"""What ``mull convert`` and ``mull layers`` read, measure and print."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mull.data.packing import PackedDataset
from mull.data.retrieval import Retrieval, retrieval_task
from mull.evaluation.search.layer_choice import UNITS, LayerChoice, Method, choose_layers
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts
from mull.retrofit.convert import Coverage, engine_notes
from mull.retrofit.hybrid import DeltaStart, HybridAttentionConfig
from mull.retrofit.reading import read_config

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CALIBRATION_LENGTH = 1024
"""Most tokens of a row to calibrate on: half-lives are shorter than rows."""

CALIBRATION_TOKENS = 16_384
CALIBRATION_BATCH = 2


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
        print_table([("layer", f"score ({UNITS[choice.method]})", "95 % from", "to", "")])
    print_table([(s.layer, s.score, s.low, s.high, "stays" if s.layer in choice.keep else "") for s in choice.scores])
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


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Cells in columns of one width."""
    for row in rows:
        print(*(f"{cell:.4f}".rjust(21) if isinstance(cell, float) else f"{cell:>21}" for cell in row), sep="")
