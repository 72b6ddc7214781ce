"""Pack documents, or examples of a prompt and a completion, into rows of one length, without mixing them.

Documents follow each other in a row. ``position_ids`` restart at each document; the model reads the boundaries from them. The
first token of a document has no label, because it would be predicted from another document. Attention and recurrent layers
must both respect the restarts: a model that only resets positions still carries recurrent state into the next document.

Shapes: N rows, T tokens per row.
"""

import bisect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mull.data.tasks import Example
from mull.data.tokenizer import TextEncoder
from mull.ops.targets import IGNORED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PackedDataset:
    """Rows of packed documents."""

    input_ids: Tensor
    """[N, T] int64."""

    labels: Tensor
    """[N, T] int64: ``input_ids``, not shifted; -100 at the first token of each document, at padding and in prompts."""

    position_ids: Tensor
    """[N, T] int64: position in the document; 0 begins the next one. Padding is a document of its own."""

    bytes_per_token: float | None = None
    """UTF-8 bytes of the packed texts per token, without prompts and begin tokens; None if the texts are not known. It turns a
    mean loss in nats into bits per byte: ``loss / (ln 2 * bytes_per_token)``."""

    rewards: Tensor | None = None
    """[N, T] float32: outcome of each token's example, 0 at padding; None if outcomes are not known."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B]."""
        batch = {
            "input_ids": self.input_ids[indices],
            "labels": self.labels[indices],
            "position_ids": self.position_ids[indices],
        }
        return batch if self.rewards is None else {**batch, "rewards": self.rewards[indices]}

    def in_order(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every row once, in order, for evaluation. The last batch may be smaller.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        return (self.rows(indices) for indices in torch.arange(len(self)).split(batch_size))


def pack_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab_size: int | None = None
) -> PackedDataset:
    """Tokenize documents as `mull.data.tokenizer.TextEncoder` does, and pack them.

    Args:
        texts: One string per document.
        tokenizer: Must have an ``eos_token``, which also pads the last row if there is no ``pad_token``.
        length: Tokens per row.
        vocab_size: Size of the model's vocabulary; if given, tokens are checked against it.

    Raises:
        ValueError: the tokenizer has no end-of-text token, no document has text, or a token is outside the vocabulary.
    """
    encoder = TextEncoder(tokenizer)
    kept = [text for text in texts if text]
    documents = encoder.documents(kept)
    n_tokens = sum(len(document) - len(encoder.begin) for document in documents)
    return pack_tokens(
        documents,
        length=length,
        pad_id=_padding(encoder),
        vocab_size=vocab_size,
        bytes_per_token=sum(len(text.encode()) for text in kept) / n_tokens if n_tokens else None,
    )


def _padding(encoder: TextEncoder) -> int:
    pad_id = encoder.tokenizer.pad_token_id
    return encoder.end if pad_id is None else int(pad_id)


def pack_tokens(
    documents: Iterable[Sequence[int]],
    *,
    length: int,
    pad_id: int,
    vocab_size: int | None = None,
    bytes_per_token: float | None = None,
) -> PackedDataset:
    """Pack token ids: documents in their order, every row filled to the end.

    What is left of a document at the end of a row begins the next row as a document of its own. Documents of fewer than two
    tokens have no target and are dropped, and so are rows without a target.

    Args:
        length: Tokens per row.
        pad_id: Token that fills the last row.

    Raises:
        ValueError: rows of fewer than two tokens, no document of at least two, or a token, `pad_id` included, outside the
            vocabulary.
    """
    _check_length(length)
    kept = [np.asarray(document, dtype=np.int64) for document in documents if len(document) >= 2]
    if not kept:
        raise ValueError(
            "The dataset is empty: no document has at least 2 tokens. Check the paths or the filter of the data."
        )
    stream = np.concatenate(kept)
    check_vocabulary(stream, pad_id, vocab_size)

    n_rows = -(-len(stream) // length)
    input_ids = np.full(n_rows * length, pad_id)
    input_ids[: len(stream)] = stream
    begins = np.zeros(n_rows * length, dtype=bool)
    begins[np.cumsum([0, *map(len, kept[:-1])])] = True
    begins[len(stream) : len(stream) + 1] = True  # the padding, where there is any
    begins[::length] = True
    index = np.arange(n_rows * length)
    position_ids = index - np.maximum.accumulate(np.where(begins, index, 0))
    labels = np.where(begins | (index >= len(stream)), IGNORED, input_ids)

    has_target = (labels.reshape(n_rows, length) != IGNORED).any(1)
    arrays = (array.reshape(n_rows, length)[has_target] for array in (input_ids, labels, position_ids))
    input_rows, label_rows, position_rows = map(torch.from_numpy, arrays)
    return PackedDataset(input_rows, label_rows, position_rows, bytes_per_token)


class TokenizedExample(NamedTuple):
    """A prompt and its completion, with an outcome."""

    prompt: Sequence[int]
    """Token ids that are not trained on."""

    completion: Sequence[int]
    """Token ids that are trained on, including the end of the text."""

    outcome: float | None = None
    """Reward of every token of the example; None if unknown."""

    n_bytes: int | None = None
    """UTF-8 bytes of the completion's text; None if unknown."""


def pack_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab_size: int | None = None
) -> PackedDataset:
    """Tokenize examples as `mull.data.tokenizer.TextEncoder` does, and pack them as `pack_tokenized_examples` does.

    Prompt and completion are tokenized separately, so that no token spans both. In generation, too, the prompt is tokenized
    without its completion.

    Raises:
        ValueError: as in `pack_tokenized_examples`, or the tokenizer has no end-of-text token.
    """
    encoder, given = TextEncoder(tokenizer), list(examples)
    encoded = encoder.examples([(example.prompt, example.completion) for example in given])
    tokenized = [
        TokenizedExample(prompt, completion, example.outcome, len(example.completion.encode()))
        for (prompt, completion), example in zip(encoded, given, strict=True)
    ]
    return pack_tokenized_examples(tokenized, length=length, pad_id=_padding(encoder), vocab_size=vocab_size)


def pack_tokenized_examples(
    examples: Iterable[TokenizedExample], *, length: int, pad_id: int, vocab_size: int | None = None
) -> PackedDataset:
    """Pack examples whole: each, in the given order, goes into the fullest row that still has room, or else into a new row.

    Examples longer than a row are dropped, with a warning: their rest would be read without its prompt, and the outcome
    belongs to the end. Examples without a target are dropped, too.

    Args:
        examples: Either all or none with an outcome.
        length: Tokens per row.

    Returns:
        Rows with ``rewards`` if the examples have outcomes, and with ``bytes_per_token`` if the bytes of all are known.

    Raises:
        ValueError: rows of fewer than two tokens, only some of the examples have an outcome, none fits into a row, or a token is
            outside the vocabulary.

    Source:
        Best-fit packing (arXiv:2404.10830), which sorts by length. We keep the order of the data: rows of examples of one
        size would make batches of one kind of problem.
    """
    _check_length(length)
    kept = [example for example in examples if len(example.completion) > (not example.prompt)]
    n_outcomes = sum(example.outcome is not None for example in kept)
    if n_outcomes not in (0, len(kept)):
        raise ValueError(f"{n_outcomes} of {len(kept)} examples have an outcome: give all of them one, or none.")
    fitting = [example for example in kept if _n_tokens(example) <= length]
    if not fitting:
        why = "there are none with a target"
        if kept:
            why = f"the shortest of {len(kept)} has {min(map(_n_tokens, kept))} tokens, length={length}"
        raise ValueError(f"No example fits into a row: {why}. Use longer rows, or check the data.")
    if len(fitting) < len(kept):
        logger.warning(
            "%d of %d examples are longer than length=%d and dropped.", len(kept) - len(fitting), len(kept), length
        )
    places = _best_fit([_n_tokens(example) for example in fitting], length)
    return _place(fitting, places, length, pad_id, vocab_size)


def _n_tokens(example: TokenizedExample) -> int:
    return len(example.prompt) + len(example.completion)


def _best_fit(sizes: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Row and offset of each item. No item is larger than a row."""
    places: list[tuple[int, int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
    n_rows = 0
    for size in sizes:
        best = bisect.bisect_left(open_rows, (size, 0))
        left, row = open_rows.pop(best) if best < len(open_rows) else (length, n_rows)
        n_rows = max(n_rows, row + 1)
        places.append((row, length - left))
        if left - size >= 2:  # smaller examples have no target
            bisect.insort(open_rows, (left - size, row))
    return places


def _place(
    examples: Sequence[TokenizedExample],
    places: Sequence[tuple[int, int]],
    length: int,
    pad_id: int,
    vocab_size: int | None,
) -> PackedDataset:
    """Write the examples at their (row, offset)."""
    shape = (1 + max(row for row, _ in places), length)
    input_ids, labels, position_ids = np.full(shape, pad_id), np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64)
    rewards, used = np.zeros(shape, dtype=np.float32), np.zeros(len(input_ids), dtype=np.int64)
    for (prompt, completion, outcome, _), (row, start) in zip(examples, places, strict=True):
        tokens = np.asarray([*prompt, *completion], dtype=np.int64)
        here, first_target = slice(start, start + len(tokens)), start + max(1, len(prompt))
        input_ids[row, here] = tokens
        labels[row, first_target : here.stop] = tokens[first_target - start :]
        position_ids[row, here] = np.arange(len(tokens))
        rewards[row, here] = outcome or 0.0
        used[row] = max(used[row], here.stop)
    check_vocabulary(input_ids, pad_id, vocab_size)
    columns = np.arange(length)
    position_ids = np.where(columns < used[:, None], position_ids, columns - used[:, None])
    n_bytes = [example.n_bytes for example in examples if example.n_bytes is not None]
    n_tokens = sum(len(example.completion) for example in examples)
    return PackedDataset(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(position_ids),
        bytes_per_token=sum(n_bytes) / n_tokens if len(n_bytes) == len(examples) else None,
        rewards=None if examples[0].outcome is None else torch.from_numpy(rewards),
    )


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a row needs a token to predict from and one to predict.")


def check_vocabulary(tokens: np.ndarray, pad_id: int, vocab_size: int | None) -> None:
    """Padding is checked even where no row needs it: that depends on the data, and the model must read any."""
    if vocab_size is None:
        return
    for what, token in (("The padding token", pad_id), ("Token", int(tokens.max()))):
        if token >= vocab_size:
            raise ValueError(
                f"{what} {token} is outside the model's vocabulary of {vocab_size} tokens: use the model's own tokenizer, "
                f"or a model with at least {token + 1} tokens."
            )
