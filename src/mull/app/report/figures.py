"""The figures of reports."""

import io
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from mull.evaluation.search.split import SplitReport


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which stay apart under the common forms of colour blindness; yellow is too light on white."""


MARKERS = "osD^vPX"


DASHES = ("--", ":", "-.")


BLOCK_COLOURS = {"encode": "#DCE9F5", "think": "#FBE3CF", "decode": "#DDF0E6"}


GREY = "#5B6470"


STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": ["sans-serif"],
    "font.size": 10,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "mull",  # the same numbers give the same file
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One labelled line of a figure."""

    label: str
    """Name in the legend. Series of one figure that share a label share a colour."""

    x: Sequence[int | float]
    """Where the values were measured."""

    y: Sequence[int | float]
    """The values; as many as `x`."""

    error: Sequence[int | float] = ()
    """Half widths of error bars, as many as `x`, or none."""

    def __post_init__(self) -> None:
        """Refuse lengths that do not match.

        Raises:
            ValueError: names the series and its lengths.
        """
        if len(self.x) != len(self.y) or len(self.error) not in (0, len(self.x)):
            raise ValueError(
                f"Series {self.label!r} has {len(self.x)} x, {len(self.y)} y and {len(self.error)} error values: "
                "give as many y as x, and as many errors or none."
            )


def loss_curves(
    training: Sequence[Series], held_out: Sequence[Series] = (), *, x_label: str = "tokens", window: int = 21
) -> Figure:
    """Training loss (smoothed line over the faint raw one) and held-out loss (markers) of several runs.

    Args:
        training: One series per run.
        held_out: Held-out loss of the same runs, matched by label.
        x_label: What x counts, with its unit: ``tokens`` or ``seconds``.
        window: Points of the centred moving average; 1 draws the raw loss alone.
    """
    with _style():
        figure = Figure(figsize=(7.4, 3.9), layout="constrained")
        axes = figure.subplots()
        colours = _colours([*training, *held_out])
        for series in training:
            if window > 1:
                axes.plot(series.x, series.y, color=colours[series.label], alpha=0.3, linewidth=0.7)
            axes.plot(
                series.x, _smooth(series.y, window), color=colours[series.label], label=f"{series.label}, training"
            )
        for series in held_out:
            label = f"{series.label}, held out"
            axes.plot(series.x, series.y, "o", color=colours[series.label], mec="white", ms=7, label=label, zorder=3)
            _error_bars(axes, series, colours[series.label])
        axes.set(xlabel=x_label, ylabel="loss (nats per token)")
        if x_label.startswith("tokens"):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, columns=2)
    return figure


def held_out_curves(runs: Sequence[Series], controls: Mapping[str, Series] | None = None) -> Figure:
    """Held-out loss of several runs during training, and of their controls in the same colour, dashed.

    Args:
        runs: One series per run; x is the number of tokens.
        controls: Label of a run to the series of its control.
    """
    with _style():
        figure = Figure(figsize=(7.4, 3.9), layout="constrained")
        axes = figure.subplots()
        colours = _colours(runs)
        for series, marker in zip(runs, MARKERS, strict=False):
            colour = colours[series.label]
            axes.plot(series.x, series.y, color=colour, marker=marker, label=series.label)
            if controls and (control := controls.get(series.label)) is not None:
                axes.plot(control.x, control.y, color=colour, linestyle="--", linewidth=1.2, label=control.label)
        axes.set(xlabel="tokens", ylabel="held-out loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, columns=2)
    return figure


def loss_against_iterations(
    models: Sequence[Series], controls: Mapping[str, float] | None = None, *, trained_iterations: int | None = None
) -> Figure:
    """Held-out loss at each number of think iterations, beside models that have no iterations to choose.

    Args:
        models: One series per model; x is the number of iterations.
        controls: Loss of models of fixed depth, drawn as horizontal lines.
        trained_iterations: Most iterations seen in training; beyond it the figure marks extrapolation.
    """
    with _style():
        figure = Figure(figsize=(7.4, 3.9), layout="constrained")
        axes = figure.subplots()
        _iteration_lines(axes, models, trained_iterations)
        for index, (label, loss) in enumerate((controls or {}).items()):
            axes.axhline(loss, color="#333333", linestyle=DASHES[index % len(DASHES)], linewidth=1.4, label=label)
        axes.set(xlabel="think iterations", ylabel="held-out loss (nats per token)")
        axes.margins(y=0.12)
        _legend(figure, columns=2)
    return figure


def accuracy_against_iterations(
    overall: Sequence[Series],
    by_hops: Mapping[int, Mapping[int, float]] | None = None,
    *,
    held_out_hops: Collection[int] = (),
    chance: float | None = None,
    trained_iterations: int | None = None,
) -> Figure:
    """Accuracy on a task that needs depth: overall per model, and by the number of hops for one model.

    Args:
        overall: One series per model; x is the number of think iterations, y the accuracy in 0 to 1.
        by_hops: Hops, then iterations, to accuracy in 0 to 1; drawn as a table of colours beside the lines.
        held_out_hops: Numbers of hops that training never showed; their rows are marked.
        chance: Accuracy of guessing.
        trained_iterations: Most iterations seen in training.
    """
    with _style():
        figure = Figure(figsize=(8.4 if by_hops else 7.4, 4.2), layout="constrained")
        panels = figure.subplots(1, 2 if by_hops else 1, squeeze=False, width_ratios=[1, 1.1] if by_hops else [1])[0]
        axes = panels[0]
        _iteration_lines(axes, overall, trained_iterations)
        if chance is not None:
            axes.axhline(chance, color="#333333", linestyle=":", linewidth=1.4, label="chance")
        axes.set(xlabel="think iterations", ylabel="accuracy (%)", ylim=(-0.03, 1.03), title="All questions")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        if by_hops:
            _hops_map(panels[1], by_hops, held_out_hops)
        _legend(figure, columns=3)
    return figure


def acceptance_figure(
    conditional: Sequence[float], cumulative: Sequence[float], speeds: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Acceptance of drafts by position and, beside it, the speed of decoding with and without them.

    Args:
        conditional: Share of accepted drafts at the first, second, ... position, of those whose predecessors were accepted.
        cumulative: Share of accepted drafts of all that were drafted there.
        speeds: Name of a way of decoding to tokens per second, one number per measurement; each is drawn, and their median.
    """
    with _style():
        figure = Figure(figsize=(8.4 if speeds else 7.4, 3.9), layout="constrained")
        panels = figure.subplots(1, 2 if speeds else 1, squeeze=False)[0]
        places = range(1, len(conditional) + 1)
        axes = panels[0]
        axes.plot(
            places, conditional, color=PALETTE[0], marker=MARKERS[0], label="of those whose predecessors were accepted"
        )
        axes.plot(places, cumulative, color=PALETTE[1], marker=MARKERS[1], label="of all drafted")
        axes.set(xlabel="position of the draft", ylabel="accepted (%)", ylim=(-0.03, 1.03), title="Drafts")
        axes.set_xlim(0.6, len(conditional) + 0.4)
        axes.set_xticks(places)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        if speeds:
            _speed_points(panels[1], speeds)
        _legend(figure, columns=2)
    return figure


def angular_distance_figure(split: "SplitReport") -> Figure:
    """The distance curve with the proposed blocks shaded, and below it the loop probe where there is one.

    Args:
        split: What `mull.evaluation.search.split.find_split` returned.
    """
    with _style():
        probed = bool(split.probe)
        figure = Figure(figsize=(7.4, 5.6 if probed else 3.6), layout="constrained")
        panels = figure.subplots(2 if probed else 1, 1, squeeze=False, sharex=True, height_ratios=[3, 2][: 1 + probed])[
            :, 0
        ]
        layers = range(split.n_layers)
        panels[0].errorbar(
            layers, split.distances, yerr=split.standard_errors, color=PALETTE[0], marker="o", capsize=3, elinewidth=1.2
        )
        panels[0].set(ylabel="angular distance (units of \N{GREEK SMALL LETTER PI})")
        panels[0].set_ylim(0, 1.22 * max(split.distances))  # room for the names of the blocks
        _shade_blocks(panels[0], split)
        if probed:
            _probe_bars(panels[1], split)
        panels[-1].set(xlabel="decoder layer", xlim=(-0.6, split.n_layers - 0.4))
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=18))
    return figure


def _style() -> AbstractContextManager[None]:
    """Settings of matplotlib for the duration of one figure."""
    return mpl.rc_context(STYLE)


def _colours(series: Sequence[Series]) -> dict[str, str]:
    """One colour per label, in order of appearance."""
    labels = dict.fromkeys(entry.label for entry in series)
    return {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(labels)}


def _error_bars(axes: Axes, series: Series, colour: str) -> None:
    """Bars without a line, which leaves the legend to the line itself."""
    if series.error:
        axes.errorbar(series.x, series.y, yerr=series.error, fmt="none", ecolor=colour, capsize=3, elinewidth=1.2)


def _smooth(values: Sequence[int | float], window: int) -> np.ndarray:
    """Centred moving average; near the ends, over the points there are. An exponential one would trail a falling loss."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def _iteration_lines(axes: Axes, models: Sequence[Series], trained_iterations: int | None) -> None:
    """Lines with markers over the number of iterations; iterations beyond training are shaded."""
    colours = _colours(models)
    for index, series in enumerate(models):
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(series.x, series.y, color=colours[series.label], marker=marker, label=series.label, zorder=3)
        _error_bars(axes, series, colours[series.label])
    most = max(max(series.x) for series in models)
    if trained_iterations is not None and most > trained_iterations:
        axes.axvspan(trained_iterations + 0.5, most + 0.5, color="#EEF0F3", zorder=0, label="more than in training")
        axes.set_xlim(right=most + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _speed_points(axes: Axes, speeds: Mapping[str, Sequence[float]]) -> None:
    """Every measurement as a point, in the order of measuring from left to right, and the median as a line with its number."""
    for column, measured in enumerate(speeds.values()):
        colour = PALETTE[2 + column % (len(PALETTE) - 2)]
        spread = np.linspace(-0.2, 0.2, len(measured)) if len(measured) > 1 else np.zeros(1)
        axes.plot(column + spread, measured, "o", color=colour, alpha=0.55, markeredgewidth=0)
        middle = float(np.median(measured))
        axes.hlines(middle, column - 0.28, column + 0.28, color=colour, linewidth=2.2)
        axes.annotate(f"{middle:.3g}", (column + 0.28, middle), (4, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(speeds)), labels=list(speeds))
    axes.grid(visible=False, axis="x")
    axes.set(
        xlim=(-0.5, len(speeds) - 0.25),
        ylim=(0, 1.12 * max(max(measured) for measured in speeds.values())),
        xlabel="way of decoding",
        ylabel="tokens per second",
        title="Speed",
    )


def _legend(figure: Figure, columns: int) -> None:
    """A legend above the axes, where it covers no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(handles)))


def _hops_map(axes: Axes, by_hops: Mapping[int, Mapping[int, float]], held_out_hops: Collection[int]) -> None:
    """Accuracy by hops (rows) and iterations (columns), each cell with its number."""
    hops = sorted(by_hops)
    iterations = sorted({iteration for row in by_hops.values() for iteration in row})
    grid = np.array([[by_hops[hop].get(iteration, np.nan) for iteration in iterations] for hop in hops])
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", origin="lower")  # 1.15: full blue hides the text
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            shade = "white" if value > 0.7 else "#1B1F24"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(len(iterations)), labels=[str(iteration) for iteration in iterations])
    axes.set_yticks(
        range(len(hops)), labels=[f"{hop} (held out)" if hop in held_out_hops else str(hop) for hop in hops]
    )
    for label, hop in zip(axes.get_yticklabels(), hops, strict=True):
        label.set_color(PALETTE[1] if hop in held_out_hops else GREY)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="think iterations", ylabel="hops", title="Accuracy by hops (%)")


def _shade_blocks(axes: Axes, split: "SplitReport") -> None:
    """Shade and name encode, think and decode behind the curve."""
    sizes = (split.etd.n_encoder_layers, split.etd.n_think_layers, split.etd.n_decoder_layers)
    start = 0
    for (name, colour), size in zip(BLOCK_COLOURS.items(), sizes, strict=True):
        if size:
            axes.axvspan(start - 0.5, start + size - 0.5, color=colour, zorder=0, linewidth=0)
            axes.text(
                start + size / 2 - 0.5, 0.97, f"{name}\n{size}", ha="center", va="top", transform=axes.get_xaxis_transform(),
                color="#333333", fontsize=9,
            )  # fmt: skip
        start += size


def _probe_bars(axes: Axes, split: "SplitReport") -> None:
    """Extra loss of looping each window, one bar per window of the proposal's width, at the window's centre."""
    width = split.etd.n_think_layers
    windows = [cost for cost in split.probe if cost.stop - cost.start == width]
    if not windows:  # probe_widths left the proposal's width out
        width = split.probe[0].stop - split.probe[0].start
        windows = [cost for cost in split.probe if cost.stop - cost.start == width]
    chosen = split.etd.n_encoder_layers
    colours = [
        PALETTE[1] if cost.start == chosen and width == split.etd.n_think_layers else "#9AA5B1" for cost in windows
    ]
    axes.bar(
        [(cost.start + cost.stop - 1) / 2 for cost in windows],
        [cost.extra_loss for cost in windows],
        width=0.7,
        color=colours,
    )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(
        ylabel="extra loss (nats)",
        title=f"Loop probe: {width} layers around each bar run twice, untrained (orange: the proposal)",
    )


def svg(figure: Figure) -> str:
    """A figure as one ``<svg>`` element, without an XML prolog and without metadata."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
