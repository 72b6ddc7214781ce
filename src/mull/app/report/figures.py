"""The figures of reports, each a function from numbers to a `matplotlib.figure.Figure`. None touches pyplot's global state."""

import io
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from mull.evaluation.search.calibration import DepthPoint
from mull.evaluation.search.split import SplitReport

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, distinct under the common forms of colour blindness; without yellow, which is too light on white."""

MARKERS = "osD^vPX"
DASHES = ("--", ":", "-.")
BLOCK_COLOURS = {"encode": "#DCE9F5", "think": "#FBE3CF", "decode": "#DDF0E6"}
GREY = "#5B6470"
DROPPED = "#CBD2D9"
KNEE: dict[str, Any] = {
    "textcoords": "offset points",
    "ha": "center",
    "arrowprops": {"arrowstyle": "->"},
    "color": GREY,
}
SMOOTHING = 21
"""Points of the moving average over a training loss."""

STYLE = mpl.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)

Line = Mapping[int, float]
"""x to y, in the order of drawing."""


@mpl.rc_context(STYLE)
def loss_curves(runs: Mapping[str, Line]) -> Figure:
    """Training loss of several runs against tokens: a smoothed line over the faint raw one."""
    figure = Figure()
    axes = figure.subplots()
    for colour, (name, line) in zip(cycle(PALETTE), runs.items(), strict=False):
        axes.plot([*line], [*line.values()], color=colour, alpha=0.3, linewidth=0.7)
        axes.plot([*line], _smooth([*line.values()]), color=colour, label=f"{name}, training")
    return _finish_losses(figure, axes, "loss (nats per token)")


@mpl.rc_context(STYLE)
def held_out_curves(runs: Mapping[str, Line], controls: Mapping[str, tuple[str, Line]]) -> Figure:
    """Held-out loss of several runs against tokens.

    Args:
        runs: By name of the run.
        controls: Name of a run to the name and the losses of its control, which is dashed in the same colour.
    """
    figure = Figure()
    axes = figure.subplots()
    for colour, marker, (name, line) in zip(cycle(PALETTE), cycle(MARKERS), runs.items(), strict=False):
        axes.plot([*line], [*line.values()], color=colour, marker=marker, label=name)
        if name in controls:
            label, control = controls[name]
            axes.plot([*control], [*control.values()], color=colour, linestyle="--", linewidth=1.2, label=label)
    return _finish_losses(figure, axes, "held-out loss (nats per token)")


@mpl.rc_context(STYLE)
def loss_against_iterations(models: Mapping[str, Line], controls: Mapping[str, float]) -> Figure:
    """Held-out loss at each number of think iterations, with models of fixed depth as horizontal lines."""
    figure = Figure()
    axes = figure.subplots()
    _iteration_lines(axes, models)
    for dash, (name, loss) in zip(cycle(DASHES), controls.items(), strict=False):
        axes.axhline(loss, color="#333333", linestyle=dash, linewidth=1.4, label=name)
    axes.set(ylabel="held-out loss (nats per token)")
    axes.margins(y=0.12)
    return _with_legend(figure, columns=2)


@mpl.rc_context(STYLE)
def accuracy_against_iterations(
    overall: Mapping[str, Line], by_hops: Mapping[int, Line], *, held_out_hops: Collection[int], trained_iterations: int
) -> Figure:
    """Accuracy on a task that needs depth: over all questions, and as a table of colours by the number of hops.

    Args:
        overall: Think iterations to accuracy in 0 to 1, by name of the model.
        by_hops: The same by number of hops, for one model.
        held_out_hops: Numbers of hops that training never showed; their rows are marked.
        trained_iterations: Most iterations seen in training; more are shaded.
    """
    figure = Figure(figsize=(8.4, 4.2))
    axes, table = figure.subplots(1, 2, width_ratios=[1, 1.1])
    _iteration_lines(axes, overall)
    most = max(iterations for line in overall.values() for iterations in line)
    if most > trained_iterations:
        axes.axvspan(trained_iterations + 0.5, most + 0.5, color="#EEF0F3", zorder=0, label="more than in training")
        axes.set_xlim(right=most + 0.5)
    _percent(axes, ylabel="accuracy (%)", title="All questions")
    _hops_map(table, by_hops, held_out_hops)
    return _with_legend(figure, columns=3)


@mpl.rc_context(STYLE)
def acceptance_figure(
    conditional: Sequence[float], cumulative: Sequence[float], speeds: Mapping[str, Sequence[float]]
) -> Figure:
    """Acceptance of drafts by position and, beside it, the speed of decoding.

    Args:
        conditional: Share of accepted drafts at the first, second, … position, of those whose predecessors were accepted.
        cumulative: Share of accepted drafts of all that were drafted there.
        speeds: Tokens per second of each measurement, by way of decoding. Each is drawn, and their median.
    """
    figure = Figure(figsize=(8.4, 3.9))
    axes, speed = figure.subplots(1, 2)
    places = range(1, len(conditional) + 1)
    label = "of those whose predecessors were accepted"
    axes.plot(places, conditional, color=PALETTE[0], marker=MARKERS[0], label=label)
    axes.plot(places, cumulative, color=PALETTE[1], marker=MARKERS[1], label="of all drafted")
    _percent(axes, xlabel="position of the draft", ylabel="accepted (%)", title="Drafts")
    axes.set(xlim=(0.6, len(conditional) + 0.4), xticks=places)
    _speed_points(speed, speeds)
    return _with_legend(figure, columns=2)


@mpl.rc_context(STYLE)
def angular_distance_figure(split: SplitReport) -> Figure:
    """The distance curve with its knees and the proposed blocks shaded, and the loop probe below it if there was one."""
    n_panels = 2 if split.probe else 1
    figure = Figure(figsize=(7.4, 5.6 if split.probe else 3.6))
    panels = figure.subplots(n_panels, 1, squeeze=False, sharex=True, height_ratios=[3, 2][:n_panels])[:, 0]
    panels[0].errorbar(
        range(split.n_layers), split.distances, yerr=split.standard_errors, color=PALETTE[0], marker="o", capsize=3,
        elinewidth=1.2,
    )  # fmt: skip
    panels[0].set(ylabel="angular distance (units of \N{GREEK SMALL LETTER PI})")
    panels[0].set_ylim(0, 1.22 * max(split.distances))  # room for the names of the blocks
    _shade_blocks(panels[0], split)
    for knee in (split.encoder_knee, split.decoder_knee):
        if knee is not None:
            panels[0].annotate("knee", (knee, split.distances[knee]), (0, 22), **KNEE)
    if split.probe:
        _probe_bars(panels[1], split)
    panels[-1].set(xlabel="decoder layer", xlim=(-0.6, split.n_layers - 0.4))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=18))
    return figure


@mpl.rc_context(STYLE)
def depth_figure(curve: Sequence[DepthPoint]) -> Figure:
    """Loss against executed layers: a line for each way of stopping, and a point for the oracle."""
    figure = Figure()
    axes = figure.subplots()
    names = list(dict.fromkeys(point.rule for point in curve))
    for colour, marker, name in zip(cycle(PALETTE), cycle(MARKERS), names, strict=False):
        points = sorted((point.layers, point.loss) for point in curve if point.rule == name)
        style = "--" if name in ("fixed", "random") else "-"
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=style, label=name)
    axes.set_xlabel("decoder layers per token (mean)")
    axes.set_ylabel("held-out loss (nats per token)")
    return _with_legend(figure, 3)


@mpl.rc_context(STYLE)
def hops_figure(rules: Mapping[str, Mapping[float, float]], by_hops: Mapping[int, float]) -> Figure:
    """Accuracy in 0 to 1 against mean iterations, by rule, and the mean iterations of questions by their hops."""
    figure = Figure(figsize=(8.4, 3.9))
    axes, bars = figure.subplots(1, 2)
    for colour, marker, (name, line) in zip(cycle(PALETTE), cycle(MARKERS), rules.items(), strict=False):
        points = sorted(line.items())
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle="--" if name == "fixed" else "-",
            label=name,
        )
    _percent(axes, xlabel="iterations per question (mean)", ylabel="right answers (%)", title="Right answers")
    bars.bar([*by_hops], [*by_hops.values()], color=PALETTE[0])
    bars.set(xlabel="hops of the question", ylabel="iterations (mean)", title="Depth of a question", xticks=[*by_hops])
    return _with_legend(figure, 3)


def _finish_losses(figure: Figure, axes: Axes, label: str) -> Figure:
    axes.set(xlabel="tokens", ylabel=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return _with_legend(figure, columns=2)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average, centred because an exponential one would lag behind a falling loss; shorter near the ends."""
    kernel = np.ones(min(SMOOTHING, len(values)))
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def _iteration_lines(axes: Axes, models: Mapping[str, Line]) -> None:
    for colour, marker, (name, line) in zip(cycle(PALETTE), cycle(MARKERS), models.items(), strict=False):
        axes.plot([*line], [*line.values()], color=colour, marker=marker, label=name, zorder=3)
    axes.set(xlabel="think iterations")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _speed_points(axes: Axes, speeds: Mapping[str, Sequence[float]]) -> None:
    """Measurements as points, from left to right in the order of measuring, and their median as a line with its number."""
    for column, (colour, measured) in enumerate(zip(cycle(PALETTE[2:]), speeds.values(), strict=False)):
        spread = np.linspace(-0.2, 0.2, len(measured)) if len(measured) > 1 else np.zeros(1)
        axes.plot(column + spread, measured, "o", color=colour, alpha=0.55, markeredgewidth=0)
        middle = float(np.median(measured))
        axes.hlines(middle, column - 0.28, column + 0.28, color=colour, linewidth=2.2)
        axes.annotate(f"{middle:.3g}", (column + 0.28, middle), (4, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(speeds)), labels=list(speeds))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="way of decoding", ylabel="tokens per second", title="Speed")
    fastest = max(max(measured) for measured in speeds.values())
    axes.set(xlim=(-0.5, len(speeds) - 0.25), ylim=(0, 1.12 * fastest))


def _with_legend(figure: Figure, columns: int) -> Figure:
    """Add a legend above the axes, where it covers no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(handles)))
    return figure


def _percent(axes: Axes, **labels: str) -> None:
    """Let the y axis show shares of 0 to 1 in per cent."""
    axes.set(ylim=(-0.03, 1.03), **labels)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _hops_map(axes: Axes, by_hops: Mapping[int, Line], held_out_hops: Collection[int]) -> None:
    """Accuracy by hops (rows) and iterations (columns), each cell with its number."""
    hops = sorted(by_hops)
    iterations = sorted({iteration for row in by_hops.values() for iteration in row})
    grid = np.array([[by_hops[hop].get(iteration, np.nan) for iteration in iterations] for hop in hops])
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", origin="lower")  # 1.15: full blue hides the text
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            shade = "white" if value > 0.7 else "#1B1F24"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(len(iterations)), labels=list(map(str, iterations)))
    names = [f"{hop} (held out)" if hop in held_out_hops else str(hop) for hop in hops]
    axes.set_yticks(range(len(hops)), labels=names)
    for label, hop in zip(axes.get_yticklabels(), hops, strict=True):
        label.set_color(PALETTE[1] if hop in held_out_hops else GREY)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="think iterations", ylabel="hops", title="Accuracy by hops (%)")


def _shade_blocks(axes: Axes, split: SplitReport) -> None:
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


def _probe_bars(axes: Axes, split: SplitReport) -> None:
    """Extra loss of looping each window, one bar per window of the proposal's width, at the window's centre."""
    width = split.etd.n_think_layers
    for cost in split.probe:
        if cost.width == width:
            other = DROPPED if cost.dropped else "#7A8794"
            centre = (cost.start + cost.stop - 1) / 2
            colour = PALETTE[1] if cost.start == split.etd.n_encoder_layers else other
            axes.bar(centre, cost.extra_loss, width=0.7, color=colour, yerr=cost.standard_error, ecolor=GREY, capsize=2)
    # The windows at both ends cost 50 times as much as those in the middle.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="extra loss (nats)")
    axes.set(title=f"Loop probe: {width} layers around each bar run twice (orange: proposed, light: dropped)")


@mpl.rc_context(STYLE)
def svg(figure: Figure) -> str:
    """A figure as one ``<svg>`` element, without an XML prolog and without metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
