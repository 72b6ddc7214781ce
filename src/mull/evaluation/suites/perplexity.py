"""Perplexity of texts, in windows and with definitions of lm-eval's ``loglikelihood_rolling``, so that the numbers are equal.

A text is cut into windows as long as the model reads. Each token is predicted once, from those before it in its window. The first
window begins with the token that begins a text (``bos_token``, else ``eos_token``), a later one with the last token of the window
before it. Only the last window looks further back, and scores only what is left.
"""

import re
from collections.abc import Callable, Sequence
from math import exp, log
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mull.data.sources import Document
from mull.evaluation.suites.statistics import FEW, Score, Sums, score
from mull.ops.cross_entropy import accurate
from mull.runtime.distributed import gather_objects, rank, world_size
from mull.runtime.progress import Progress

Logits = Callable[[Tensor], Tensor]
"""Logits ``[B, T, V]`` of token numbers ``[B, T]``."""


class Window(NamedTuple):
    """Tokens that are read at once, and how many of the last ones are predicted."""

    tokens: list[int]
    """All of them, the one before the first prediction included."""

    n_predicted: int


class TextLoss(NamedTuple):
    """Loss of one text."""

    name: str
    windows: tuple[Sums, ...]
    """Nats and tokens of each window."""

    words: int
    """Pieces between white space, as lm-eval counts them."""

    bytes: int

    @property
    def nats(self) -> float:
        """Summed over the tokens."""
        return sum(nats for nats, _ in self.windows)

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return int(sum(tokens for _, tokens in self.windows))


def windows(tokens: Sequence[int], begin: int, length: int) -> list[Window]:
    """Cut a text.

    Args:
        tokens: To predict.
        begin: Stands before the first token.
        length: Most tokens that the model reads at once.
    """
    text = [begin, *tokens]
    found = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        # The last window is as long as the others; what it does not predict is context.
        found.append(Window(text[max(0, stop - length) : stop + 1], stop - start))
    return found


@torch.no_grad()
def text_losses(
    logits: Logits,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    length: int,
    batch_size: int,
    device: torch.device,
) -> list[TextLoss]:
    """Loss of each text. With several ranks, each measures a share of the windows, and all return the same.

    Args:
        logits: Of the model.
        tokenizer: Of the model.
        documents: Texts that are not blank, with names of their own.
        length: Most tokens of a window; lm-eval takes the model's positions.
        batch_size: Windows per pass.
        device: Of the model.

    Raises:
        ValueError: the tokenizer has neither a ``bos_token`` nor an ``eos_token``.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ValueError(
            "The tokenizer has neither bos_token nor eos_token, one of which stands before a text: set one."
        )
    encoded = [tokenizer.encode(document.text) for document in documents]
    cuts = [(text, window) for text, tokens in enumerate(encoded) for window in windows(tokens, begin, length)]
    jobs = [(place, text, window) for place, (text, window) in enumerate(cuts)]
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)][rank() :: world_size()]
    found: dict[int, float] = {}
    with Progress(sum(map(len, batches)), "window", label="perplexity") as progress:
        for batch in batches:
            places = [place for place, *_ in batch]
            found |= zip(places, _losses(logits, [window for *_, window in batch], device), strict=True)
            progress.advance(len(batch))
    nats = {place: loss for part in gather_objects(found) for place, loss in part.items()}
    of_text: list[list[Sums]] = [[] for _ in documents]
    for place, text, window in jobs:
        of_text[text].append((nats[place], float(window.n_predicted)))
    return [
        TextLoss(document.name, tuple(sums), len(re.split(r"\s+", document.text)), len(document.text.encode("utf-8")))
        for document, sums in zip(documents, of_text, strict=True)
    ]


def _losses(logits: Logits, batch: Sequence[Window], device: torch.device) -> list[float]:
    width = max(len(window.tokens) - 1 for window in batch)
    rows = [window.tokens[:-1] + [0] * (width - len(window.tokens) + 1) for window in batch]  # padded after what counts
    found = logits(torch.tensor(rows, device=device))
    losses = []
    for row, window in zip(found, batch, strict=True):
        targets = torch.tensor(window.tokens[1:], device=row.device)
        scores = row[: len(targets)].to(accurate(row.dtype)).log_softmax(-1)
        chosen = scores.gather(-1, targets[:, None])[-window.n_predicted :]
        losses.append(-float(chosen.double().sum()))
    return losses


def perplexity_scores(
    losses: Sequence[TextLoss], *, seed: int = 0
) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    """lm-eval's ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte``, and the perplexity per token.

    Intervals are the bootstrap over texts; if there are fewer than `FEW`, over windows, whose words and bytes are then counted in
    proportion to their tokens. Only what is per word or byte can be compared between tokenizers.
    """
    tokens = sum(text.tokens for text in losses)
    words, n_bytes = (sum(counts) for counts in zip(*((text.words, text.bytes) for text in losses), strict=True))
    if len(losses) >= FEW:
        units = {text.name: (text.nats, float(text.tokens), float(text.words), float(text.bytes)) for text in losses}
    else:
        units = {
            f"{text.name}, window {number}": (nats, n, n * words / tokens, n * n_bytes / tokens)
            for text in losses
            for number, (nats, n) in enumerate(text.windows)
        }
    values: dict[str, dict[str, Sums]] = {
        f"nats per {unit}": {name: (sums[0], sums[place]) for name, sums in units.items()}
        for place, unit in enumerate(("token", "word", "byte"), start=1)
    }
    per = {name: score(sums, seed=seed, proportion=False) for name, sums in values.items()}
    scores = {
        "token_perplexity": _mapped(per["nats per token"], exp),
        "word_perplexity": _mapped(per["nats per word"], exp),
        "byte_perplexity": _mapped(per["nats per byte"], exp),
        "bits_per_byte": _mapped(per["nats per byte"], lambda nats: nats / log(2)),
    }
    return {**scores, "nats per token": per["nats per token"]}, values


def _mapped(found: Score, function: Callable[[float], float]) -> Score:
    low, high = (None if end is None else function(end) for end in (found.low, found.high))
    return Score(function(found.value), low, high, found.n)
