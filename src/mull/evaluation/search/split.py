"""Split search: which layers should encode, think and decode, measured on a pretrained model.

Two measurements, neither of which trains anything. The *loop probe* says what the loss becomes when a window of layers runs
twice, and proposes the split. The *angular distance* says how far each layer turns the residual stream; its knees from both ends
bound the flat middle of the curve. They are shown beside the proposal and decide nothing: on a real model, that middle is most
of the model, and costs 20 times as much to run twice as a window of 8 layers in it.

Shapes: B batch, T tokens, D model width, L decoder layers.
"""

import time
from collections.abc import Callable, Sequence
from math import pi
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from kneed import KneeLocator
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from mull.evaluation.search.loop_probe import (
    Batch,
    WindowCost,
    candidate_windows,
    layers_per_batch,
    loop_losses,
    loop_probe,
)
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, attention_period, layer_kinds
from mull.model.path import Visit, from_layers
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.progress import Progress
from mull.runtime.timing import fastest
from mull.training.optimization import resolve_precision

Tokens = Literal["all", "last"]

LARGEST_SHARE = 1 / 3
"""Largest think block by default, as a share of the layers. The published split has a quarter."""

PROBED_SHARES = (1, 1 / 2)
"""Widths that are probed by default, as shares of the published one. The half is closer to the 3 to 4 layers with which loops do
best that are never trained (arXiv:2605.23872)."""

PRECISIONS = ("auto", "fp32", "bf16")


class SplitReport(BaseModel):
    """What `find_split` measured, and the split that follows from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str
    """Where the model was loaded from; empty for a model that was never saved."""

    etd: ETDConfig
    """The proposed split."""

    method: Literal["probe", "published"]
    """What decided: the loop probe, or without one the published fractions."""

    notes: tuple[str, ...]
    """What the probe and the knees say about the proposal, a sentence each."""

    distances: tuple[float, ...]
    """Mean angle between the residual stream before and after each layer, in units of pi; one entry per layer."""

    standard_errors: tuple[float, ...] | None
    """Standard error of each distance over batches; None for a single batch."""

    tokens: Tokens
    """Positions the distances average over: every token that is not padding, or the last one of each row."""

    n_batches: int
    """Batches measured."""

    n_tokens: int
    """Positions measured, over all batches."""

    sensitivity: float
    """Sensitivity of the knee search."""

    encoder_knee: int | None
    """First layer of the flat middle, seen from the front; None where the curve has no knee."""

    decoder_knee: int | None
    """Last layer of the flat middle, seen from the back; None where the curve has no knee."""

    plain_loss: float | None
    """Loss of the plain pass over the probe's batches, in nats per token; None without a probe."""

    probe: tuple[WindowCost, ...]
    """Every probed window, by width and then by start; empty without a probe."""

    precision: str
    """What the passes computed in: the dtype of the model, or ``bf16`` under autocast."""

    n_passes: float
    """What was run, in passes of a batch through all decoder layers: distances and probe, without the measurement of speed."""

    seconds: float
    """Wall time of the search."""

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.distances)

    def to_json(self) -> str:
        """The report as JSON, which ``SplitReport.model_validate_json`` reads."""
        return self.model_dump_json(indent=2)


def angular_distance(
    before: Float[Tensor, "B T D"], after: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean angle between the residual stream before and after a run of layers.

    A small angle marks layers that refine rather than transform, which is where a recursive block costs least.

    Args:
        before: Hidden states entering the first layer of the run.
        after: Hidden states leaving the last one.
        mask: True at the positions to average over; padding must be False.

    Returns:
        Angle in units of pi, so 0 is "same direction" and 1 is "reversed".

    Raises:
        ValueError: `mask` selects no position.

    Source:
        Gromov et al. 2024 (arXiv:2403.17887). They measure the last token only; we average over `mask`. The angle comes from
        ``2 atan2(|u - v|, |u + v|)`` of the unit vectors: the arccos of a cosine near 1 loses half of its digits.
    """
    if not mask.any():
        raise ValueError(
            "No position to measure: the mask is False everywhere. Give a batch with tokens that are not padding."
        )
    u = F.normalize(before[mask].float(), dim=-1)  # (N, D), N positions
    v = F.normalize(after[mask].float(), dim=-1)
    return (2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / pi).mean()


def measured_positions(batch: Batch, tokens: Tokens = "all") -> Bool[Tensor, "B T"]:
    """Positions whose residual stream is compared.

    Args:
        batch: ``input_ids`` and, where there is padding, ``attention_mask``.
        tokens: ``all`` for every token that is not padding, ``last`` for the last such token of each row.

    Raises:
        ValueError: unknown name in `tokens`, or a row without a token under ``last``.
    """
    if tokens not in ("all", "last"):
        raise ValueError(f"tokens={tokens!r} is not known. Choose 'all' or 'last'.")
    attention = batch.get("attention_mask")
    if attention is None:
        real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    elif attention.dim() == 4:  # (B, 1, T, T): a token that is not padding attends at least to itself
        real = attention[:, 0].diagonal(dim1=-2, dim2=-1).bool()
    else:
        real = attention.bool()
    if tokens == "all":
        return real
    if not real.any(-1).all():
        raise ValueError("tokens='last' needs a token in every row, but a row of the batch is padding throughout.")
    last = real.shape[1] - 1 - real.flip(1).int().argmax(-1)  # (B,)
    return F.one_hot(last, real.shape[1]).bool()


@torch.no_grad()
def layer_distances(model: MullForCausalLM, batch: Batch, tokens: Tokens = "all") -> Float[Tensor, " L"]:
    """Angular distance across every decoder layer of one plain pass, in units of pi. Recursion is left out.

    Args:
        model: The model to measure.
        batch: ``input_ids``, optionally ``attention_mask`` and ``position_ids``; labels are ignored.
        tokens: As in `measured_positions`.
    """
    mask = measured_positions(batch, tokens)
    distances: list[Tensor] = []

    def measure(_visit: Visit, before: Tensor, after: Tensor) -> None:
        distances.append(angular_distance(before, after, mask))

    model.model(
        batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
        path=from_layers(range(model.config.get_text_config().num_hidden_layers)),
        on_visit=measure,
    )
    return torch.stack(distances)


def find_knees(distances: Sequence[float], sensitivity: float = 1.0) -> tuple[int | None, int | None]:
    """Bounds of the flat middle of the distance curve.

    Args:
        distances: One angular distance per layer.
        sensitivity: Kneedle's S: how many points must flatten after a knee before it counts.

    Returns:
        First and last layer of the flat middle. An end of the curve without a decline, or without a knee in it, gives None.
        The first is never after the last: each is on its own side of the curve's minimum.

    Source:
        Encode-Think-Decode (arXiv:2510.07358): Kneedle from the front (steep to gradual decline) and from the last layer
        backwards. The paper does not say how the rise at the other end is treated; we search the running minimum from
        each end, which is flat there. Among several knees we take the one furthest from the chord.
    """
    front = _knee(np.minimum.accumulate(np.asarray(distances, dtype=float)), sensitivity)
    back = _knee(np.minimum.accumulate(np.asarray(distances, dtype=float)[::-1]), sensitivity)
    return front, None if back is None else len(distances) - 1 - back


def _knee(declining: np.ndarray, sensitivity: float) -> int | None:
    """Index of the knee of a curve that never rises."""
    if declining[0] == declining[-1]:
        return None
    locator = KneeLocator(
        range(len(declining)), declining, S=sensitivity, curve="convex", direction="decreasing", online=True
    )
    knees = [int(knee) for knee in locator.all_knees]
    return max(knees, key=lambda knee: locator.y_difference[knee]) if knees else None


def default_widths(n_layers: int, n_think: int, period: int = 1) -> list[int]:
    """Widths of the windows that are probed by default: `PROBED_SHARES` of the published think block, in whole periods.

    None is over `LARGEST_SHARE` of the model, unless a single attention period is.

    Args:
        n_layers: Decoder layers of the model.
        n_think: Layers of its published think block.
        period: Attention period of a hybrid.
    """
    most = max(int(LARGEST_SHARE * n_layers / period), 1)
    return sorted({min(max(round(share * n_think / period), 1), most) * period for share in PROBED_SHARES})


def find_split(
    model: PreTrainedModel,
    batches: Callable[[int], Batch],
    *,
    n_batches: int = 8,
    tokens: Tokens = "all",
    sensitivity: float = 1.0,
    n_probe_batches: int = 4,
    probe_widths: Sequence[int] | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    progress: bool = True,
) -> SplitReport:
    """Measure a model and propose which of its layers encode, think and decode.

    The probe decides. Of the windows that cost no more per layer than the cheapest one, as far as the text can tell, the widest
    becomes the think block; among several of that width, the one of least extra loss. Without a probe, the published fractions
    are proposed. The knees of the distance curve are reported beside that.

    Args:
        model: A mull or Hugging Face causal language model with at least 3 decoder layers. It is not changed.
        batches: Batch number to batch, the text to measure on; batches 0 to ``n_batches - 1`` are used. The probe compares
            rows, and drops windows after each batch: many small batches are decided sooner than a few large ones.
        n_batches: Batches for the distances; two or more give standard errors.
        tokens: See `measured_positions`. The paper uses ``last``.
        sensitivity: See `find_knees`.
        n_probe_batches: Most batches for each window of the loop probe; 0 leaves the probe out.
        probe_widths: Widths of the probed windows; by default those of `default_widths`, at most a third of the model.
        precision: ``bf16`` runs a model in fp32 under autocast, ``fp32`` does not; losses are computed and added in fp32 and
            fp64 in both. ``auto`` times both on one row, where the device has bf16, and takes the faster. Another dtype stays
            what it is.
        progress: Show on stderr how many passes there are, how long they will take, and how far they are.

    Raises:
        ValueError: fewer than 3 layers, no batch, no token that is not padding, or widths that do not fit the model.

    Source:
        Encode-Think-Decode (arXiv:2510.07358), which averages the last token over 10,000 sequences of C4, decides by the knees
        and has no probe.
    """
    config = model.config.get_text_config()
    n_layers = config.num_hidden_layers
    if n_layers < 3:
        raise ValueError(
            f"A model of {n_layers} layers has no split to find: encode, think and decode need a layer each."
        )
    if n_batches < 1 or n_probe_batches < 0:
        raise ValueError(f"n_batches={n_batches} must be at least 1, and n_probe_batches={n_probe_batches} at least 0.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known. Choose one of {', '.join(PRECISIONS)}.")
    started, training = time.perf_counter(), model.training
    published, period = ETDConfig.for_model(model), attention_period(layer_kinds(config))
    widths = probe_widths or default_widths(n_layers, published.n_think_layers, period)
    windows = candidate_windows(n_layers, widths, period) if n_probe_batches else []
    n_runs = n_batches * n_layers + n_probe_batches * layers_per_batch(n_layers, windows)
    plain_loss: float | None = None
    probe: tuple[WindowCost, ...] = ()
    model.eval()
    try:
        looped = model if isinstance(model, MullForCausalLM) else wrap_transformer_with_etd(model, None)
        with Progress(n_runs, "layer", label="split", shown=progress) as bar:
            first, n_passes = batches(0), f"{'at most ' if windows else ''}{n_runs / n_layers:.0f}"
            autocast, seconds = _choose_autocast(looped, first, precision)
            name = "bf16" if autocast else str(looped.dtype).removeprefix("torch.")
            expected = tqdm.format_interval(seconds * n_runs / n_layers)
            bar.say(f"split: {n_passes} passes of {first['input_ids'].numel():,} tokens in {name}, about {expected}")
            with torch.autocast(looped.device.type, torch.bfloat16, enabled=autocast):
                per_batch, n_tokens = _measure(looped, batches, n_batches, tokens, bar)  # (n_batches, L)
                if windows:
                    plain_loss, probe = loop_probe(looped, batches, windows, n_probe_batches, bar)
    finally:
        model.train(training)

    mean = per_batch.mean(0).tolist()
    knees = find_knees(mean, sensitivity)
    etd, notes = _propose(probe, published)
    return SplitReport(
        model_name=config.name_or_path or "",
        etd=etd,
        method="probe" if probe else "published",
        notes=(*notes, _describe_knees(*knees)),
        distances=tuple(mean),
        standard_errors=tuple((per_batch.std(0) / n_batches**0.5).tolist()) if n_batches > 1 else None,
        tokens=tokens,
        n_batches=n_batches,
        n_tokens=n_tokens,
        sensitivity=sensitivity,
        encoder_knee=knees[0],
        decoder_knee=knees[1],
        plain_loss=plain_loss,
        probe=probe,
        precision=name,
        n_passes=bar.done / n_layers,
        seconds=time.perf_counter() - started,
    )


def _measure(
    model: MullForCausalLM, batches: Callable[[int], Batch], n_batches: int, tokens: Tokens, progress: Progress
) -> tuple[Float[Tensor, "N L"], int]:
    """Distances of every batch, and the number of positions measured."""
    rows, n_tokens = [], 0
    for index in range(n_batches):
        batch = {key: value.to(model.device) for key, value in batches(index).items()}
        n_tokens += int(measured_positions(batch, tokens).sum())
        rows.append(layer_distances(model, batch, tokens))
        progress.advance(len(rows[-1]))
    return torch.stack(rows).cpu(), n_tokens


def _choose_autocast(
    model: MullForCausalLM, batch: Batch, precision: Literal["auto", "fp32", "bf16"]
) -> tuple[bool, float]:
    """Whether to run under autocast to bf16, and the seconds of a pass over the batch, both from passes over its first row."""
    row = {key: value[:1].to(model.device) for key, value in batch.items()}
    resolved = resolve_precision(precision, model.device)
    # A device that emulates bf16 is slower in it, and on a busy machine one measurement may say otherwise.
    choices = (False, True) if (precision, resolved) == ("auto", "bf16") else (resolved == "bf16",)
    silent = Progress(None, "layer", shown=False)
    seconds = {}
    for autocast in choices if model.dtype == torch.float32 else (False,):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            seconds[autocast] = fastest(
                lambda: loop_losses(model, row, [], silent), model.device, warm_up=1, repetitions=2
            )
    chosen = min(seconds, key=lambda autocast: seconds[autocast])
    return chosen, seconds[chosen] * len(batch["input_ids"])


def _propose(probe: Sequence[WindowCost], published: ETDConfig) -> tuple[ETDConfig, tuple[str, ...]]:
    """The split, and what the probe says about it."""
    if not probe:
        return published, ("No window was probed: these are the published fractions.",)
    left = [cost for cost in probe if not cost.dropped]
    best = min(left, key=lambda cost: (-cost.width, cost.extra_loss))
    etd = ETDConfig(
        n_encoder_layers=best.start, n_think_layers=best.width, n_decoder_layers=published.n_layers - best.stop
    )
    error = "" if best.standard_error is None else f" ± {best.standard_error:.3f}"
    return etd, (
        f"Layers {best.start} to {best.stop - 1} run twice cost {best.extra_loss:+.3f}{error} nats per token, untrained.",
        f"Of {len(probe)} windows, {len(left)} cost no more per layer than the cheapest, as far as {best.n_rows} rows can tell; "
        "the widest of these is proposed.",
    )


def _describe_knees(first: int | None, last: int | None) -> str:
    """A sentence on the knees of the distance curve."""
    if first is not None and last is not None:
        return f"The knees of the distance curve, which do not decide, put layers {first} to {last} in the middle."
    ends = [end for end, knee in (("front", first), ("back", last)) if knee is None]
    return f"The distance curve has no knee from the {' and the '.join(ends)}."
