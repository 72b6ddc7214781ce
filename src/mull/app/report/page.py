"""The HTML report of a run: one self-contained page that fetches nothing.

`Report` collects prose, figures, tables and samples of text, and writes them with the command, machine, seeds and date that
produced them.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mull.app.report.figures import svg


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One piece of a section, as the template reads it."""

    kind: str
    """``prose``, ``figure``, ``table`` or ``sample``."""

    body: Any
    """Paragraphs, SVG, rows of cells, or text."""

    caption: str = ""
    """Plain text below a figure or a table, or above a sample."""

    columns: tuple[tuple[str, bool], ...] = ()
    """A table's columns: heading, and whether the column holds numbers."""


Rows = Sequence[Sequence[str | int | float | None]]
"""Cells of a table, row by row."""


class Table(NamedTuple):
    """Content of a table, as `Section.table` formats it."""

    columns: Sequence[str]
    rows: Rows
    digits: int = 4


@dataclass(slots=True)
class Section:
    """A heading and its content. Each method adds one piece and returns the section, so that calls chain."""

    heading: str
    blocks: list[Block] = field(default_factory=list)

    def prose(self, text: str) -> "Section":
        """Add paragraphs, separated by blank lines.

        Text between backticks is set as code, and ``[text](page.html)`` is a link. Everything else is escaped.
        """
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]
        self.blocks.append(Block(kind="prose", body=paragraphs))
        return self

    def figure(self, figure: Figure, caption: str) -> "Section":
        """Add a figure; the caption also describes it to a screen reader."""
        self.blocks.append(Block(kind="figure", body=svg(figure), caption=caption))
        return self

    def table(self, columns: Sequence[str], rows: Rows, caption: str = "", digits: int = 4) -> "Section":
        """Add a table. Columns of numbers are right-aligned.

        Args:
            columns: Headings, with units.
            rows: Cells. Integers get thousands separators, None is a dash, and strings stay as they are.
            caption: Text below the table.
            digits: Significant digits of a column's largest float; the column's other floats get the same number of decimals.

        Raises:
            ValueError: a row whose length differs from the headings.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"A table of {len(columns)} columns got a row of {len(row)} cells: {list(row)}.")
        values = [[row[index] for row in rows] for index in range(len(columns))]
        numeric = [not any(isinstance(value, str) for value in column) for column in values]
        heads = tuple(zip(columns, numeric, strict=True))
        cells = zip(*(_cells(column, digits) for column in values), strict=True)
        self.blocks.append(Block(kind="table", body=list(cells), caption=caption, columns=heads))
        return self

    def place(self, piece: Figure | Table | str, caption: str) -> "Section":
        """Add a figure, a table or a sample of text."""
        if isinstance(piece, Table):
            return self.table(piece.columns, piece.rows, caption, piece.digits)
        return self.sample(caption, piece) if isinstance(piece, str) else self.figure(piece, caption)

    def sample(self, caption: str, text: str) -> "Section":
        """Add text that keeps its line breaks, such as a sample of a model or the output of a command."""
        self.blocks.append(Block(kind="sample", body=text, caption=caption))
        return self


@dataclass(slots=True)
class Report:
    """A page: title, subtitle, sections, and where the numbers come from.

    Example:
        ``report = Report("Demo", command="mull demo", seeds=[0])``, then
        ``report.section("Loss").prose("...").figure(loss_curves(runs), "...")`` and ``report.write("report.html")``.
    """

    title: str
    subtitle: str = ""
    command: str = ""
    """The command that produces the page."""

    seeds: Sequence[int] = ()
    """Seeds of the runs."""

    provenance: dict[str, str] = field(default_factory=dict)
    """Further lines of the provenance block, such as the data or the wall time."""

    sections: list[Section] = field(default_factory=list)

    def section(self, heading: str) -> Section:
        """Begin a section; add to the one returned."""
        self.sections.append(Section(heading))
        return self.sections[-1]

    def add(self, template: str, facts: Mapping[str, Any]) -> None:
        """Add the sections of a Jinja template of Markdown, filled with `facts`.

        Blank lines separate its parts: ``## heading`` begins a section, ``![caption](name)`` places the figure, `Table` or
        sample of text that `facts` has under this name, and everything else is prose.
        """
        # Nothing is escaped here because the page escapes all text.
        environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        for part in re.split(r"\n\s*\n", environment.from_string(template).render(facts).strip()):
            placed = re.fullmatch(r"!\[(.*)\]\((\w+)\)", part, re.DOTALL)
            if part.startswith("## "):
                self.section(part.removeprefix("## "))
            elif placed is None:
                self.sections[-1].prose(part)
            else:
                self.sections[-1].place(facts[placed[2]], " ".join(placed[1].split()))

    def html(self) -> str:
        """The page as text."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["spans"] = _spans
        environment.filters["inline_svg"] = _inline_svg
        template = resources.files("mull.app.report").joinpath("page.html.j2").read_text("utf-8")
        facts = {
            "Command": self.command,
            "Seeds": ", ".join(map(str, self.seeds)),
            **self.provenance,
            **machine(),
            "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        known = {name: fact for name, fact in facts.items() if fact}
        return environment.from_string(template).render(report=self, facts=known)

    def write(self, path: str | Path) -> Path:
        """Write the page; missing folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path


def machine() -> dict[str, str]:
    """The machine that the numbers were measured on: processor, threads, accelerator and versions."""
    cores = os.cpu_count()
    facts = {"Processor": _processor_name(), "Threads": f"{torch.get_num_threads()} of {cores} cores"}
    if torch.cuda.is_available():
        facts["Accelerator"] = torch.cuda.get_device_name()
    python = platform.python_version()
    facts["Versions"] = f"Python {python}, torch {torch.__version__}, transformers {transformers.__version__}"
    return facts


def _processor_name() -> str:
    """The processor's name: from a file on Linux, from Python elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _cells(column: Sequence[str | int | float | None], digits: int) -> list[str]:
    """One column of a table as text."""
    largest = max((abs(value) for value in column if isinstance(value, float) and isfinite(value)), default=0.0)
    if 0 < largest < 1e-3:
        style = f".{max(digits - 3, 0)}e"
    else:
        style = f",.{max(digits - 1 - (floor(log10(largest)) if largest else 0), 0)}f"
    cells = []
    for value in column:
        if isinstance(value, float):
            cells.append(format(value, style) if value else "0")
        else:
            cells.append("-" if value is None else f"{value:,}" if isinstance(value, int) else value)
    return cells


def _spans(text: str) -> Markup:
    """Escape `text`, set text between backticks as code and ``[text](page.html)`` as a link to a page in the same folder."""
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\[([^\]]+)\]\(([\w-]+\.html)\)", r'<a href="\2">\1</a>', coded))


def _inline_svg(text: str, prefix: str, label: str) -> Markup:
    """Prepare an SVG for a page, where its ids must not collide with those of other figures."""
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
