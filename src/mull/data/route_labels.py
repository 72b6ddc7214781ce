"""Route labels: for each question, the shortest route through a model's layers that was found to answer it.

A file of labels is JSON lines. The first line is ``{"settings": {…}}``, what the search ran with. Each further line is a
`RouteLabel`, appended when its question is finished, so a search that was stopped goes on after the last whole line.
"""

import json
from pathlib import Path
from typing import Any, Literal

from mull.runtime.arguments import Frozen


class RouteLabel(Frozen):
    """What a search found for one question. Without ``correct``, no route was right."""

    index: int
    """Number of the question in its task, from 0."""

    prompt: str
    answer: str
    """The right answer; of a multiple-choice question the right option."""

    route: tuple[Literal[0, 1, 2], ...]
    """Action of each layer: 0 skips it, 1 runs it, 2 runs it twice in succession. The shortest correct route; of equally
    short ones, that of least loss. All 1, the plain route, if none was correct."""

    correct: bool
    """Whether the model answers correctly along `route`, as the labeller judges."""

    base_correct: bool
    """The same along the plain route; always true for the labeller ``loss``."""

    loss: float
    """Nats per token of the answer along `route`."""

    base_loss: float
    """The same along the plain route."""

    visits: int
    """Layers that `route` runs, repeats counted twice."""

    simulations: int
    """Simulations of the tree search."""

    evaluated: int
    """Distinct routes that the model ran, the plain one included."""

    layers: int
    """Layers that the search ran, states of common beginnings shared."""

    layers_unshared: int
    """Layers of the evaluated routes, one by one."""


def read_labels(path: Path) -> tuple[dict[str, Any], list[RouteLabel]]:
    """Settings and labels of a file, without a half-written last line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of labels.
    """
    text = path.read_bytes()
    try:
        # Not splitlines(), which also splits at separators that JSON allows inside a string.
        first, *others = text[: text.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]
        return dict(json.loads(first)["settings"]), [RouteLabel.model_validate_json(line) for line in others]
    except (ValueError, KeyError, TypeError):  # pydantic's errors are ValueErrors
        raise ValueError(f"{path} has no route labels: give a file that `mull routes` wrote.") from None
