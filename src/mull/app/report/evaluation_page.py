"""Results of ``mull eval`` as Markdown and as figures."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mull.app.report.figures import GREY, MARKERS, PALETTE, STYLE, svg
from mull.evaluation.suites.results import ORACLE, Bin, Result
from mull.evaluation.suites.statistics import Comparison, Score
from mull.runtime import storage

REPORT, FIGURES = "report.md", "figures"


@mpl.rc_context(STYLE)
def score_figure(scores: Mapping[str, Score], title: str = "") -> Figure:
    """Scores as points with their intervals, one line each.

    Those of at most 1 have a panel of their own: on the axis of a perplexity their intervals are too short to see.
    """
    shares = {name: score for name, score in scores.items() if score.value <= 1}
    parts = [part for part in (shares, {name: scores[name] for name in scores if name not in shares}) if part]
    sizes = [len(part) + 1.5 for part in parts]
    figure = Figure(figsize=(6.4, 0.6 + 0.38 * sum(sizes)))
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, part in zip(panels, parts, strict=True):
        for place, score in enumerate(reversed([*part.values()])):
            if score.low is not None and score.high is not None:
                axes.hlines(place, score.low, score.high, color=GREY)
            axes.plot(score.value, place, color=PALETTE[0], marker=MARKERS[0])
        axes.set(yticks=range(len(part)), yticklabels=[*part][::-1], ylim=(-0.6, len(part) - 0.4))
    panels[0].set_title(title)
    panels[-1].set_xlabel("value and 95 % interval")
    return figure


@mpl.rc_context(STYLE)
def reliability_figure(bins: Mapping[str, Sequence[Bin]]) -> Figure:
    """Accuracy against confidence of each head; on the diagonal, a head is as often right as it says."""
    figure = Figure(figsize=(4.8, 4.6))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for colour, marker, (name, of_head) in zip(cycle(PALETTE), cycle(MARKERS), bins.items(), strict=False):
        shown = [each for each in of_head if each.n]
        points = [each.confidence for each in shown], [each.accuracy for each in shown]
        axes.plot(*points, color=colour, marker=marker, label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


@mpl.rc_context(STYLE)
def acceptance_ranges_figure(acceptance: Mapping[str, Sequence[float]]) -> Figure:
    """Acceptance of each head: beside each other by the position in the text, and by the position of the draft."""
    figure = Figure(figsize=(8.4, 3.8))
    parts = figure.subplots(1, 2, sharey=True)
    for axes, of_draft in zip(parts, (False, True), strict=True):
        chosen = {name: line for name, line in acceptance.items() if name.startswith("drafts") == of_draft}
        for colour, marker, (name, line) in zip(cycle(PALETTE), cycle(MARKERS), chosen.items(), strict=False):
            axes.plot(range(1, 1 + len(line)), line, color=colour, marker=marker, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="position of the draft" if of_draft else "part of the text", ylim=(0, 1.02))
        axes.legend()
    parts[0].set(ylabel="accepted")
    return figure


@mpl.rc_context(STYLE)
def temperature_figure(scores: Mapping[str, Score]) -> Figure:
    """Pass@k against the temperature, one line per k."""
    lines: dict[str, dict[float, Score]] = {}
    for name, score in scores.items():
        label, _, temperature = name.partition(" at T=")
        if temperature:
            lines.setdefault(label, {})[float(temperature)] = score
    figure = Figure()
    axes = figure.subplots()
    for colour, marker, (label, line) in zip(cycle(PALETTE), cycle(MARKERS), lines.items(), strict=False):
        values = [score.value for score in line.values()]
        below = [score.value - (score.value if score.low is None else score.low) for score in line.values()]
        above = [(score.value if score.high is None else score.high) - score.value for score in line.values()]
        axes.errorbar([*line], values, yerr=[below, above], color=colour, marker=marker, label=label, capsize=3)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="temperature", ylabel="problems solved")
    axes.legend()
    return figure


def result_figures(result: Result) -> dict[str, Figure]:
    """The figures of a result, by name."""
    title = f"{result.suite}: {Path(result.model).name}"
    found = {"scores": score_figure(result.scores, title)} if result.scores else {}
    if any(" at T=" in name for name in result.scores):
        found["temperatures"] = temperature_figure(result.scores)
    if result.reliability:
        found["reliability"] = reliability_figure(result.reliability)
    if result.acceptance:
        found["acceptance"] = acceptance_ranges_figure(result.acceptance)
    return found


def write_report(results: Mapping[str, Result], folder: Path) -> Path:
    """Write ``report.md`` with tables, and its figures as SVG beside it.

    Args:
        results: By the name of each.
        folder: Where; must exist.
    """
    models = ", ".join(dict.fromkeys(result.model for result in results.values()))
    parts = [f"# Evaluation of {models}"]
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, result in results.items():
        parts += [f"## {name}", f"`{result.command}`", *_tables(result)]
        for kind, figure in result_figures(result).items():
            file = f"{FIGURES}/{safe(name)}-{kind}.svg"
            storage.write_text_atomic(str(folder / file), svg(figure))
            parts.append(f"![{kind} of {name}]({file})")
    place = folder / REPORT
    storage.write_text_atomic(str(place), "\n\n".join(parts) + "\n")
    return place


def safe(name: str) -> str:
    """A suite's name as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in "+-_." else "-" for letter in name).strip("-.")


def _tables(result: Result) -> list[str]:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(result.settings.items()) if value is not None)
    parts = [score_table(result.scores)]
    if any(ORACLE in name for name in result.scores):
        parts.append(
            f"*{ORACLE}*: the temperature was chosen on the test problems, so no model that is used has this score."
        )
    return [*parts, *result.notes, f"Settings: {settings}."]


def score_table(scores: Mapping[str, Score]) -> str:
    """Scores with 95 % intervals, as a table in Markdown."""
    rows = [(name, f"{s.value:.4f}", _interval(s, ".4f"), str(s.n)) for name, s in scores.items()]
    return markdown_table(("score", "value", "95 % interval", "n"), rows)


def _interval(found: Score, form: str) -> str:
    return "none" if found.low is None or found.high is None else f"{found.low:{form}} to {found.high:{form}}"


def comparison_table(compared: Mapping[str, Comparison]) -> str:
    """Differences of two models, as a table in Markdown."""
    rows = []
    for name, found in compared.items():
        d = found.difference
        only = "" if found.only_first is None else f"{found.only_first} / {found.only_second}"
        p = "" if found.p_value is None else f"{found.p_value:.3g}"
        values = (f"{found.first:.4f}", f"{found.second:.4f}", f"{d.value:+.4f}", _interval(d, "+.4f"))
        rows.append((name, *values, only, p, str(d.n)))
    heads = ("score", "A", "B", "B - A", "95 % interval", "only A / only B", "McNemar p", "n")
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned, so that it can be read on a terminal, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
