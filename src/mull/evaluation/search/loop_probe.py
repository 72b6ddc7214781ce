"""Loop probe: what the loss of a pretrained model becomes when a window of its layers runs twice, without any training.

A window that runs twice shares everything up to its own end with the plain pass. So the plain pass stops after each layer, and
the windows that end there go on from its states: the window once more, then the layers after it.

Windows race. After each batch, those that cost measurably more per layer than the cheapest drop out.

Shapes: B batch, T tokens, D model width, R rows that were measured, W windows.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from scipy.special import stdtrit
from torch import Tensor

from mull.model.causal_lm import MullForCausalLM
from mull.model.executor import run
from mull.model.path import Path, from_layers, recursion
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.progress import Progress

Batch = Mapping[str, Tensor]

Window = tuple[int, int]
"""First layer of a window, and the layer after its last."""

CONFIDENCE = 0.995
"""One-sided confidence of "this window costs more than the cheapest" at which it drops out of the race."""


class WindowCost(BaseModel):
    """What running one window of layers twice does to the loss of the model as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int
    """First layer of the window."""

    stop: int
    """Layer after the last one."""

    extra_loss: float
    """Loss with the window run twice minus the loss of the plain pass, in nats per token."""

    standard_error: float | None
    """Standard error of `extra_loss` over rows; None for a single row."""

    n_rows: int
    """Rows measured."""

    dropped: bool
    """Whether the window cost measurably more per layer than the cheapest, and was measured no further."""

    @property
    def width(self) -> int:
        """Layers of the window."""
        return self.stop - self.start

    @property
    def per_layer(self) -> float:
        """Extra loss per layer that the second run adds, in nats per token."""
        return self.extra_loss / self.width


def candidate_windows(n_layers: int, widths: Sequence[int], period: int = 1) -> list[Window]:
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


def layers_per_batch(n_layers: int, windows: Sequence[Window]) -> int:
    """Decoder layers that a batch runs through: those of the plain pass, and each window once more with what follows it."""
    return n_layers + sum(n_layers - start for start, _ in windows)


@torch.no_grad()
def loop_probe(
    model: MullForCausalLM,
    batches: Callable[[int], Batch],
    windows: Sequence[Window],
    n_batches: int = 4,
    progress: Progress | None = None,
) -> tuple[float, tuple[WindowCost, ...]]:
    """Loss of the model as it is when each candidate window runs twice.

    Costs are compared row by row, which cancels how hard a row is. A window drops out when its cost per layer exceeds the
    cheapest window's with a confidence of `CONFIDENCE` (Student's t over rows); the probe ends when one window is left.

    Args:
        model: The model to probe. Its weights and its configured recursion are left alone.
        batches: Batch number to batch; batches 0 to ``n_batches - 1`` are used.
        windows: Half-open ranges of layers.
        n_batches: Most batches per window; each costs `layers_per_batch` at most.
        progress: Counts the decoder layers that run.

    Returns:
        The loss of the plain pass, and the extra loss of each window in the order given, both in nats per target token.

    Raises:
        ValueError: the batches hold no target.

    Source:
        Plain repetition as in "training-free loops" (arXiv:2605.23872, its undamped baseline). Races: Maron and Moore 1994; with
        paired differences: Moore and Lee 1994.
    """
    progress = Progress(None, "layer", shown=False) if progress is None else progress
    n_layers = model.config.get_text_config().num_hidden_layers
    race = _Race(windows)
    plain = torch.zeros(0, dtype=torch.float64)
    for left in reversed(range(n_batches)):
        batch = {key: value.to(model.device) for key, value in batches(n_batches - 1 - left).items()}
        losses, looped, counts = loop_losses(model, batch, race.running, progress)
        plain = torch.cat([plain, losses])
        race.judge({window: sums - losses for window, sums in looped.items()}, counts)
        decided = len(race.running) == 1 < len(windows)
        progress.expect(0 if decided else left * layers_per_batch(n_layers, race.running))
        if decided:
            break
    if not len(plain):
        raise ValueError(
            f"The probe's batches hold no target: every label is {IGNORED}. Give batches of text with labels."
        )
    return float(plain.sum() / race.counts.sum()), race.costs()


@torch.no_grad()
def loop_losses(
    model: MullForCausalLM, batch: Batch, windows: Sequence[Window], progress: Progress
) -> tuple[Float[Tensor, " R"], dict[Window, Float[Tensor, " R"]], Float[Tensor, " R"]]:
    """Losses of the plain pass over a batch, and of the passes that run one window twice.

    Args:
        model: The model.
        batch: ``input_ids`` and ``labels`` ``[B, T]``, optionally ``attention_mask`` and ``position_ids``, on the model's device.
        windows: Half-open ranges of layers.
        progress: Counts the decoder layers that run.

    Returns:
        For each row of the batch that has a target, in fp64 on the CPU: its loss in nats, summed over its targets; the same by
        window; and the number of its targets.
    """
    trunk = model.model
    attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    targets = targets_of(batch["labels"], label_positions(attention_mask, position_ids), 1)[..., 0]
    valid = targets >= 0
    counts = valid.sum(1)
    measured = counts > 0

    def advance(h: Tensor, visits: Path) -> Tensor:
        progress.advance(len(visits))
        return run(trunk.layers, trunk.kinds, visits, h, inputs)

    def summed(h: Tensor) -> Tensor:
        hidden = trunk.norm(h)[valid]
        _, losses = weighted_cross_entropy(hidden, model.lm_head.weight, targets[valid], hidden.new_ones(len(hidden)))
        sums = torch.zeros(len(counts), dtype=torch.float64)
        return sums.index_add(0, valid.nonzero()[:, 0].cpu(), losses.cpu().double())[measured.cpu()]

    h = trunk.embed_tokens(batch["input_ids"])
    inputs = trunk.layer_inputs(h, attention_mask, position_ids)
    n_layers = len(trunk.layers)
    looped = {}
    for layer in range(n_layers):
        h = advance(h, from_layers([layer]))
        for start, stop in windows:
            if stop == layer + 1:
                path = recursion(start, stop - start, n_layers - stop, 2)
                looped[start, stop] = summed(advance(h, path[stop:]))
    return summed(h), looped, counts[measured].cpu().double()


def mean_and_error(
    sums: Float[Tensor, "*W R"], counts: Float[Tensor, " R"]
) -> tuple[Float[Tensor, "*W"], Float[Tensor, "*W"]]:
    """Mean per target of losses that are summed by row, and its standard error over rows; 0 for a single row.

    Source:
        The ratio estimator of survey sampling: rows are drawn, and have unequal numbers of targets.
    """
    n_rows, total = len(counts), counts.sum()
    mean = sums.sum(-1) / total
    residuals = sums - mean[..., None] * counts
    return mean, (residuals.square().sum(-1) * n_rows / max(n_rows - 1, 1)).sqrt() / total


class _Race:
    """Windows that may still be the cheapest per layer, and what was measured of all."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.running = list(windows)
        self.counts = torch.zeros(0, dtype=torch.float64)
        self._extra = dict.fromkeys(windows, self.counts)

    def judge(self, extra: Mapping[Window, Tensor], counts: Tensor) -> None:
        """Take the extra loss of each running window, summed by row, and drop the windows that can be told from the best."""
        self.counts = torch.cat([self.counts, counts])
        for window, sums in extra.items():
            self._extra[window] = torch.cat([self._extra[window], sums])
        if len(self.counts) < 2:
            return
        per_layer = torch.stack([self._extra[start, stop] / (stop - start) for start, stop in self.running])  # (W, R)
        best = per_layer[per_layer.sum(1).argmin()]
        mean, error = mean_and_error(per_layer - best, self.counts)
        dearer = mean > stdtrit(len(self.counts) - 1, CONFIDENCE) * error
        self.running = [window for window, drops in zip(self.running, dearer.tolist(), strict=True) if not drops]

    def costs(self) -> tuple[WindowCost, ...]:
        """What was measured, in the order of the windows."""
        costs = []
        for (start, stop), sums in self._extra.items():
            mean, error = mean_and_error(sums, self.counts[: len(sums)])
            costs.append(
                WindowCost(
                    start=start,
                    stop=stop,
                    extra_loss=float(mean),
                    standard_error=float(error) if len(sums) > 1 else None,
                    n_rows=len(sums),
                    dropped=(start, stop) not in self.running,
                )
            )
        return tuple(costs)
