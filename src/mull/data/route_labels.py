"""Route labels: for each question, the shortest route through a model's layers that was found to answer it.

A file of labels is JSON lines. The first line is ``{"settings": {…}}``, what the search ran with. Each further line is a
`RouteLabel`, appended when its question is finished, so a search that was stopped goes on after the last whole line.

Shapes: N rows, T tokens per row, B rows of a batch, L layers.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mull.data.packing import check_vocabulary
from mull.data.tokenizer import TextEncoder
from mull.ops.targets import IGNORED
from mull.runtime.arguments import Frozen
from mull.runtime.storage import local_path

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, eq=False)
class RouteRows:
    """Questions with their answers and routes, one in each row."""

    input_ids: Tensor
    """[N, T] int64, padded on the right."""

    attention_mask: Tensor
    """[N, T] int64, 0 at padding."""

    labels: Tensor
    """[N, T] int64: ``input_ids``, not shifted; -100 in prompts and at padding."""

    route_labels: Tensor
    """[N, L] int64: action of each layer."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B], as long as its longest row."""
        stop = int(self.attention_mask[indices].sum(1).max())
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}
        batch = {name: tensor[indices, :stop] for name, tensor in tokens.items()}
        return batch | {"route_labels": self.route_labels[indices]}

    def split(self, share: float, seed: int) -> "tuple[RouteRows, RouteRows]":
        """Two random parts, each in the order of the rows.

        Args:
            share: Of the rows, in the second part.
            seed: Of the draw.
        """
        chosen = np.random.default_rng(seed).permutation(len(self)) < round(share * len(self))
        kept, others = (torch.from_numpy(part.nonzero()[0]) for part in (~chosen, chosen))
        return self.part(kept), self.part(others)

    def part(self, indices: Tensor) -> "RouteRows":
        """The rows with these indices."""
        tensors = (self.input_ids, self.attention_mask, self.labels, self.route_labels)
        return RouteRows(*(tensor[indices] for tensor in tensors))


def load_route_rows(
    paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab_size: int | None = None
) -> RouteRows:
    """Tokenize the labels of files. Those without a correct route, or longer than a row, are left out, with a warning.

    Args:
        paths: Files that `mull routes` wrote, for one model.
        tokenizer: The model's.
        length: Most tokens of a question and its answer.
        vocab_size: Size of the model's vocabulary; if given, tokens are checked against it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is none of labels, routes have different numbers of layers, no label is left, or a token is outside
            the vocabulary.
    """
    encoder, found, n_labels = TextEncoder(tokenizer), list[tuple[RouteLabel, list[int], list[int]]](), 0
    for path in paths:
        settings, labels = read_labels(local_path(path))
        right = [label for label in labels if label.correct]
        pairs = encoder.examples([(label.prompt, label.answer) for label in right])
        ends = None if settings.get("end") else -1  # whether the end of the text belongs to an answer
        found += [(label, prompt, answer[:ends]) for label, (prompt, answer) in zip(right, pairs, strict=True)]
        n_labels += len(labels)
    fitting = [row for row in found if len(row[1]) + len(row[2]) <= length]
    if len(widths := {len(label.route) for label, _, _ in fitting}) != 1:
        raise ValueError(
            f"Of {n_labels} labels in {', '.join(map(str, paths))}, {len(found)} have a correct route, and {len(fitting)} of "
            f"these fit into length={length}, with routes through {sorted(widths) or 'no'} layers: give labels of one model."
        )
    if len(fitting) < n_labels:
        message = "%d of %d labels are left out: %d have no correct route, %d are longer than length=%d."
        logger.warning(
            message, n_labels - len(fitting), n_labels, n_labels - len(found), len(found) - len(fitting), length
        )
    rows = [torch.tensor([*prompt, *answer]) for _, prompt, answer in fitting]
    targets = [torch.tensor([*[IGNORED] * len(prompt), *answer]) for _, prompt, answer in fitting]
    input_ids = pad_sequence(rows, batch_first=True)
    check_vocabulary(input_ids.numpy(), 0, vocab_size)
    return RouteRows(
        input_ids,
        pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        torch.tensor([label.route for label, _, _ in fitting]),
    )
