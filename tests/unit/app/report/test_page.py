"""Claim: the report is one safe, self-contained page, and its figures show the numbers they were given.

The page is read back with Python's HTML parser, the figures with its XML parser and through the artists they hold.
"""

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from mull.app.report.figures import (
    SMOOTHING,
    acceptance_figure,
    accuracy_against_iterations,
    angular_distance_figure,
    held_out_curves,
    loss_against_iterations,
    loss_curves,
    svg,
)
from mull.app.report.page import Report, Table
from mull.evaluation.search.loop_probe import WindowCost
from mull.evaluation.search.split import SplitReport
from mull.model.configs import ETDConfig

VOID = {"meta", "link", "br", "hr", "img", "input", "base"}


class Page(HTMLParser):
    """Collects what a browser would see, and refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed tags: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def window_cost(start: int) -> WindowCost:
    error, dropped = 0.01 * start if start else None, start == 3
    return WindowCost(
        start=start, stop=start + 3, extra_loss=0.1 * start, standard_error=error, n_rows=4, dropped=dropped
    )


def split_report(**changes: object) -> SplitReport:
    values = {
        "model_name": "tiny",
        "etd": ETDConfig(n_encoder_layers=2, n_think_layers=3, n_decoder_layers=1),
        "method": "probe",
        "notes": (),
        "distances": (0.4, 0.2, 0.1, 0.08, 0.09, 0.3),
        "standard_errors": (0.01,) * 6,
        "tokens": "all",
        "n_batches": 4,
        "n_tokens": 64,
        "sensitivity": 1.0,
        "encoder_knee": 2,
        "decoder_knee": 4,
        "plain_loss": 2.0,
        "probe": tuple(window_cost(start) for start in range(4)),
        "precision": "float32",
        "n_passes": 20.0,
        "seconds": 2.0,
    }
    return SplitReport.model_validate({**values, **changes})


def figures() -> dict[str, Figure]:
    lines = {"a <b>": {1: 0.3, 2: 0.6, 4: 0.7}, "c": {1: 0.2}}
    hops = {2: {1: 0.1, 2: 0.9}, 3: {1: 0.2}}
    return {
        "held out": held_out_curves({"a": {0: 3.1, 9: 3.0}}, {"a": ("a, shuffled", {0: 3.1, 9: 3.2})}),
        "loss": loss_curves({"a": dict.fromkeys(range(50), 3.0)}),
        "iterations": loss_against_iterations(lines, {"control": 0.5}),
        "accuracy": accuracy_against_iterations(lines, hops, held_out_hops={3}, trained_iterations=2),
        "acceptance": acceptance_figure([0.8, 0.5], [0.8, 0.4], {"plain": [9.0, 11.0, 14.0], "2 drafts": [12.0]}),
        "acceptance, one position": acceptance_figure([0.8], [0.8], {"plain": [9.0]}),
        "split": angular_distance_figure(split_report()),
        "split without probe": angular_distance_figure(split_report(probe=(), standard_errors=None)),
    }


def page(report: Report) -> Page:
    return Page(report.html())


def test_every_figure_is_well_formed_svg_and_the_same_twice() -> None:
    for (name, figure), again in zip(figures().items(), figures().values(), strict=True):
        text = svg(figure)
        assert ElementTree.fromstring(text).tag.endswith("svg"), name
        assert text == svg(again), name
        assert "<metadata" not in text, name


def test_global_settings_of_matplotlib_stay_as_they_were() -> None:
    before = dict(mpl.rcParams)
    for figure in figures().values():
        svg(figure)
    assert dict(mpl.rcParams) == before


def test_axes_name_their_units_and_legends_cover_no_data() -> None:
    for name, figure in figures().items():
        figure.draw_without_rendering()
        assert all(axes.get_ylabel() for axes in figure.axes), name
        assert figure.axes[-1].get_xlabel(), name
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), name
            assert box.x1 <= figure.bbox.x1, f"{name}: the legend is cut off"


def test_training_loss_is_smoothed_without_lag() -> None:
    def smoothed(losses: list[float]) -> np.ndarray:
        return np.asarray(loss_curves({"a": dict(enumerate(losses))}).axes[0].lines[1].get_ydata())

    falling = [float(100 - step) for step in range(100)]
    half = SMOOTHING // 2
    np.testing.assert_allclose(smoothed(falling)[half:-half], falling[half:-half])
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(smoothed(noise.tolist())) < 0.3 * np.std(noise)


def test_iterations_beyond_training_are_shaded() -> None:
    lines, hops = {"a": {1: 0.3, 2: 0.6, 4: 0.7}}, {2: {1: 0.1}}
    for trained, spans in ((2, [(2.5, 4.5)]), (4, [])):
        axes = accuracy_against_iterations(lines, hops, held_out_hops=(), trained_iterations=trained).axes[0]
        assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches] == spans


def test_accuracy_by_hops_prints_every_measured_cell_and_marks_held_out_rows() -> None:
    panel = figures()["accuracy"].axes[1]
    assert sorted(text.get_text() for text in panel.texts) == ["10", "20", "90"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["2", "3 (held out)"]


def test_acceptance_and_speed_are_drawn_as_given_with_their_medians() -> None:
    drafts, speed = figures()["acceptance"].axes
    assert [list(line.get_ydata()) for line in drafts.lines] == [[0.8, 0.5], [0.8, 0.4]]
    assert [list(line.get_xdata()) for line in drafts.lines] == [[1, 2], [1, 2]]
    assert [list(line.get_ydata()) for line in speed.lines] == [[9.0, 11.0, 14.0], [12.0]]
    assert [text.get_text() for text in speed.texts] == ["11", "12"]
    assert [label.get_text() for label in speed.get_xticklabels()] == ["plain", "2 drafts"]
    assert speed.get_ylim()[0] == 0, "a speed axis that does not begin at 0 exaggerates"
    assert [int(tick) for tick in figures()["acceptance, one position"].axes[0].get_xticks()] == [1]


def test_the_split_figure_shades_the_proposal_and_draws_its_window_apart() -> None:
    curve, probe = figures()["split"].axes
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in curve.patches]
    np.testing.assert_allclose(spans, [(-0.5, 1.5), (1.5, 4.5), (4.5, 5.5)])
    colours = [bar.get_facecolor() for bar in probe.patches]
    assert len(colours) == 4
    assert colours[0] == colours[1] != colours[3], "a window that was dropped is lighter"
    assert colours[2] not in (colours[0], colours[3])
    assert [text.xy[0] for text in curve.texts if text.get_text() == "knee"] == [2, 4]


def test_what_users_write_is_text_never_markup() -> None:
    evil = "<script>alert(1)</script> & `<b>code</b>`"
    report = Report(evil, subtitle=evil, command=evil, provenance={"Data <i>": evil})
    section = report.section(evil).prose(evil).sample(evil, evil).table([evil], [[evil]], caption=evil)
    section.figure(figures()["iterations"], caption='"><script>' + evil)
    read = page(report)
    assert not {"script", "b", "i"} & set(read.tags)
    assert read.text.count("<script>alert(1)</script>") >= 10


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    report = Report("Title", command="mull demo", seeds=[0, 1])
    for name, figure in figures().items():
        report.section(name).figure(figure, "See https://example.org in plain text.")
    read = Page(report.write(tmp_path / "new" / "report.html").read_text("utf-8"))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(read.tags)
    for name, value in read.attributes:
        if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
            assert (value or "").startswith(("#", "data:")), f"{name}={value}"
        if not name.startswith("xmlns"):
            assert "http" not in (value or "") or name == "aria-label", f"{name}={value}"
    assert "@import" not in read.text
    assert "url(" not in read.text.replace("url(#", "")


def test_ids_are_unique_and_references_resolve() -> None:
    report = Report("Title")
    report.section("One").figure(figures()["split"], "a").figure(figures()["split"], "b")
    report.section("Two").figure(figures()["loss"], "c")
    read = page(report)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in read.attributes if name in ("href", "xlink:href") and value.startswith("#")}
    targets |= {value[5:-1] for name, value in read.attributes if (value or "").startswith("url(#")}
    assert targets <= set(ids)


def test_the_page_says_where_the_numbers_come_from() -> None:
    text = page(Report("Title", command="mull demo --seed 3", seeds=[3, 4], provenance={"Data": "chains"})).text
    for fact in ("mull demo --seed 3", "3, 4", "chains", "Processor", "Threads", "torch", "transformers", "UTC"):
        assert fact in text


def test_table_formats_columns_of_numbers() -> None:
    report = Report("Title")
    rows = [["a", 1234567, 903.24, 3.1e-6, None], ["b", 2, 1.5, 0.0, 2.0]]
    block = report.section("T").table(["name", "tokens", "seconds", "difference", "loss"], rows).blocks[0]
    assert block.body == [("a", "1,234,567", "903.2", "3.1e-06", "-"), ("b", "2", "1.5", "0", "2.000")]
    assert [numeric for _, numeric in block.columns] == [False, True, True, True, True]
    assert report.html().count('<td class="number">') == 8
    with pytest.raises(ValueError, match="2 columns got a row of 1"):
        report.section("T").table(["a", "b"], [["c"]])


def test_a_template_places_prose_and_pieces_in_its_order() -> None:
    template = """
## One

{% if n > 1 %}
{{ n }} words & `code`
{% endif %}
over two lines.

![A caption of [{{ n }}]
(two) lines](counts)

## Two

![](drawn)

![A sample](text)
"""
    facts = {"n": 3, "counts": Table(["n"], [[0.123456]], digits=2), "drawn": figures()["loss"], "text": "a\n\n## b"}
    report = Report("Title")
    report.add(template, facts)
    told = [[(block.kind, block.caption) for block in section.blocks] for section in report.sections]
    assert [section.heading for section in report.sections] == ["One", "Two"]
    assert told == [
        [("prose", ""), ("table", "A caption of [3] (two) lines")],
        [("figure", ""), ("sample", "A sample")],
    ]
    one, two = report.sections
    assert one.blocks[0].body == ["3 words & `code` over two lines."]
    assert one.blocks[1].body == [("0.12",)]
    assert two.blocks[1].body == "a\n\n## b"
    with pytest.raises(UndefinedError, match="'n' is undefined"):
        report.add(template, {})


def test_a_control_has_the_colour_of_its_run_and_is_dashed() -> None:
    runs = {name: {0: 3.0, 1: 2.0} for name in "ab"}
    lines = held_out_curves(runs, {"b": ("control", {0: 3.0, 1: 2.5})}).axes[0].lines
    drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in lines}
    assert drawn["b"][0] == drawn["control"][0] != drawn["a"][0]
    assert drawn["control"][1] == "--"
    assert drawn["b"][1] == "-"
