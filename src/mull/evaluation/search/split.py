"""Split search: which layers should encode, think and decode, measured on a pretrained model.

Two measurements, neither of which trains anything. The *angular distance* says how far each layer turns the residual stream;
its knees from both ends bound the flat middle of the curve. The *loop probe* says what the loss becomes when a window of
layers runs twice. The knees propose the split, the probe checks it; see `find_split` for how they combine.

Shapes: B batch, T tokens, D model width, L decoder layers.
"""

from collections.abc import Callable, Mapping, Sequence
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

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, attention_period, layer_kinds
from mull.model.path import Visit, from_layers
from mull.ops.targets import IGNORED
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.arguments import require, require_callable, require_count, require_number

Tokens = Literal["all", "last"]
MAX_BATCHES = 1_000_000
Batch = Mapping[str, Tensor]


class WindowCost(BaseModel):
    """What running one window of layers twice does to the loss of the model as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int
    """First layer of the window."""

    stop: int
    """Layer after the last one."""

    extra_loss: float
    """Loss with the window run twice minus the loss of the plain pass, in nats per token."""


class SplitReport(BaseModel):
    """What `find_split` measured, and the split that follows from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str
    """Where the model was loaded from; empty for a model that was never saved."""

    etd: ETDConfig
    """The proposed split."""

    method: Literal["knees", "probe", "published"]
    """What decided: both knees, else the cheapest probed window, else the published fractions."""

    notes: tuple[str, ...]
    """What a reader must know about the proposal: missing knees, alignment to a hybrid's period."""

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


def candidate_windows(n_layers: int, widths: Sequence[int], period: int = 1) -> list[tuple[int, int]]:
    """Windows ``[start, stop)`` to probe: every start for each width, or every whole attention period of a hybrid.

    Raises:
        ValueError: a width outside 1 to `n_layers`, or one that cuts the period.
    """
    for width in widths:
        if not 1 <= width <= n_layers:
            raise ValueError(
                f"A probed window of {width} layers must have 1 to {n_layers} layers, the depth of the model."
            )
        if width % period:
            raise ValueError(
                f"A probed window of {width} layers would cut the attention period of this hybrid: use a multiple of {period}."
            )
    return [(start, start + width) for width in sorted(set(widths)) for start in range(0, n_layers - width + 1, period)]


@torch.no_grad()
def loop_probe(
    model: MullForCausalLM,
    batches: Callable[[int], Batch],
    windows: Sequence[tuple[int, int]],
    n_batches: int = 4,
    progress: bool = True,
) -> tuple[float, tuple[WindowCost, ...]]:
    """Loss of the model as it is when each candidate window runs twice.

    Args:
        model: The model to probe. Its weights and its configured recursion are left alone.
        batches: Batch number to batch; batches 0 to ``n_batches - 1`` are used.
        windows: Half-open ranges of layers.
        n_batches: Batches per window; a probe costs ``n_batches * (len(windows) + 1)`` passes.
        progress: Show a progress bar on stderr.

    Returns:
        The loss of the plain pass, and the extra loss of each window, both in nats per target token.

    Raises:
        ValueError: the batches hold no target.

    Source:
        Plain repetition as in "training-free loops" (arXiv:2605.23872, its undamped baseline).
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    sample = [_to_device(batches(index), model.device) for index in range(n_batches)]
    plain = _path_loss(model, sample, range(n_layers))
    costs = []
    for start, stop in tqdm(windows, desc="loop probe", unit="window", disable=None if progress else True):
        layers = [*range(stop), *range(start, n_layers)]
        costs.append(WindowCost(start=start, stop=stop, extra_loss=_path_loss(model, sample, layers) - plain))
    return plain, tuple(costs)


def _path_loss(model: MullForCausalLM, sample: Sequence[Batch], layers: Sequence[int]) -> float:
    """Mean loss per target over the sample when the layers run in this order."""
    path = from_layers(layers)
    total, n_targets = 0.0, 0
    for batch in sample:
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        if targets:
            total += float(model(**batch, path=path, use_cache=False).loss) * targets
        n_targets += targets
    if not n_targets:
        raise ValueError(
            f"The probe's batches hold no target: every label is {IGNORED}. Give batches of text with labels."
        )
    return total / n_targets


def find_split(
    model: PreTrainedModel,
    batches: Callable[[int], Batch],
    *,
    n_batches: int = 8,
    tokens: Tokens = "all",
    sensitivity: float = 1.0,
    n_probe_batches: int = 4,
    probe_widths: Sequence[int] | None = None,
    progress: bool = True,
) -> SplitReport:
    """Measure a model and propose which of its layers encode, think and decode.

    Two knees decide: layers before the first encode, layers after the second decode. Without both, the window of the published
    width that is cheapest to run twice becomes the think block; without a probe, the published fractions. In a hybrid, the
    result is rounded to whole attention periods. The report says which of these happened.

    Args:
        model: A mull or Hugging Face causal language model with at least 3 decoder layers. It is not changed.
        batches: Batch number to batch, the text to measure on; batches 0 to ``n_batches - 1`` are used.
        n_batches: Batches for the distances; two or more give standard errors.
        tokens: See `measured_positions`. The paper uses ``last``.
        sensitivity: See `find_knees`.
        n_probe_batches: Batches for each window of the loop probe; 0 leaves the probe out.
        probe_widths: Widths of the probed windows; by default that of the published split and that of the knees.
        progress: Show progress bars on stderr.

    Raises:
        TypeError: an argument of another type.
        ValueError: fewer than 3 layers, no batch, or no token that is not padding.

    Source:
        Encode-Think-Decode (arXiv:2510.07358), which averages the last token over 10,000 sequences of C4 and has no probe.
    """
    require("model", model, PreTrainedModel, "a causal language model")
    require_callable("batches", batches, "a function from the number of a batch to the batch")
    require_count("n_batches", n_batches, 1, MAX_BATCHES)
    require_count("n_probe_batches", n_probe_batches, 0, MAX_BATCHES)
    require_number("sensitivity", sensitivity)
    for width in probe_widths or ():
        require("A width to probe", width, int, "a whole number")
    config = model.config.get_text_config()
    n_layers = config.num_hidden_layers
    if n_layers < 3:
        raise ValueError(
            f"A model of {n_layers} layers has no split to find: encode, think and decode need a layer each."
        )

    training = model.training
    model.eval()
    try:
        looped = model if isinstance(model, MullForCausalLM) else wrap_transformer_with_etd(model, None)
        per_batch, n_tokens = _measure(looped, batches, n_batches, tokens, progress)  # (n_batches, L)
        mean = per_batch.mean(0).tolist()
        knees = find_knees(mean, sensitivity)
        period = attention_period(layer_kinds(config))
        published = ETDConfig.for_model(model)
        wanted = _whole_periods(*knees, n_layers, period)
        plain_loss: float | None = None
        probe: tuple[WindowCost, ...] = ()
        if n_probe_batches:
            widths = probe_widths or {published.n_think_layers, *([wanted[1] - wanted[0]] if wanted else [])}
            windows = candidate_windows(n_layers, sorted(widths), period)
            plain_loss, probe = loop_probe(looped, batches, windows, n_probe_batches, progress)
    finally:
        model.train(training)

    etd, method, notes = _propose(knees, wanted, probe, published)
    return SplitReport(
        model_name=config.name_or_path or "",
        etd=etd,
        method=method,
        notes=notes,
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
    )


def _measure(
    model: MullForCausalLM, batches: Callable[[int], Batch], n_batches: int, tokens: Tokens, progress: bool
) -> tuple[Float[Tensor, "N L"], int]:
    """Distances of every batch, and the number of positions measured."""
    rows, n_tokens = [], 0
    for index in tqdm(range(n_batches), desc="angular distance", unit="batch", disable=None if progress else True):
        batch = _to_device(batches(index), model.device)
        n_tokens += int(measured_positions(batch, tokens).sum())
        rows.append(layer_distances(model, batch, tokens))
    return torch.stack(rows).cpu(), n_tokens


def _whole_periods(start: int | None, last: int | None, n_layers: int, period: int) -> tuple[int, int] | None:
    """The window between two knees, rounded to whole attention periods; None where a knee is missing."""
    if start is None or last is None:
        return None
    width = min(max(round((last + 1 - start) / period), 1), n_layers // period) * period
    start = min(round(start / period), (n_layers - width) // period) * period
    return start, start + width


def _propose(
    knees: tuple[int | None, int | None],
    wanted: tuple[int, int] | None,
    probe: Sequence[WindowCost],
    published: ETDConfig,
) -> tuple[ETDConfig, Literal["knees", "probe", "published"], tuple[str, ...]]:
    """The split, what decided it, and what to know about it."""
    if wanted is not None:  # there are both knees
        start, stop = wanted
        notes = [f"The knees put layers {knees[0]} to {knees[1]} in the middle."]
        if knees != (start, stop - 1):
            notes.append(f"Whole attention periods make that layers {start} to {stop - 1}.")
        return _config(start, stop, published.n_layers), "knees", tuple(notes)

    ends = [end for end, knee in zip(("front", "back"), knees, strict=True) if knee is None]
    missing = f"The distance curve has no knee from the {' and the '.join(ends)}."
    candidates = [cost for cost in probe if cost.stop - cost.start == published.n_think_layers]
    if not candidates:
        return published, "published", (missing, "No window of the published width was probed: published fractions.")
    best = min(candidates, key=lambda cost: cost.extra_loss)
    chosen = f"Of {len(candidates)} windows of the published width, layers {best.start} to {best.stop - 1} cost least to loop."
    return _config(best.start, best.stop, published.n_layers), "probe", (missing, chosen)


def _config(start: int, stop: int, n_layers: int) -> ETDConfig:
    """The configuration that iterates layers ``[start, stop)``."""
    return ETDConfig(n_encoder_layers=start, n_think_layers=stop - start, n_decoder_layers=n_layers - stop)


def _to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {key: value.to(device) for key, value in batch.items()}
