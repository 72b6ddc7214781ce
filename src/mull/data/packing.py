"""Pack documents into rows of one length, and keep them apart.

Documents follow each other in a row. ``position_ids`` restart at each of them, which is how a model is told where one
ends, and the first token of each has no label, because it would be predicted from another document. Attention and
recurrent layers must both respect the restarts: a model that only resets its positions still carries recurrent state
into the next document.

Shapes: N rows, T tokens per row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class PackedDataset:
    """Rows of packed documents."""

    input_ids: Tensor
    """[N, T] int64."""

    labels: Tensor
    """[N, T] int64: ``input_ids`` (not shifted), -100 at the first token of each document and at padding."""

    position_ids: Tensor
    """[N, T] int64: position in the document; 0 begins the next one. The last row's padding is a document of its own."""

    bytes_per_token: float | None = None
    """UTF-8 bytes of the packed texts per token, to turn a mean loss in nats into bits per byte:
    ``loss / (ln 2 * bytes_per_token)``. None where token ids were packed, whose texts are not known."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B]."""
        return {
            "input_ids": self.input_ids[indices],
            "labels": self.labels[indices],
            "position_ids": self.position_ids[indices],
        }

    def in_order(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every row once, in order, as an evaluation needs them. The last batch may be smaller.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        return (self.rows(indices) for indices in torch.arange(len(self)).split(batch_size))


def pack_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, length: int, vocab_size: int | None = None
) -> PackedDataset:
    """Tokenize documents, end each with the tokenizer's end-of-text token, and pack them.

    Args:
        texts: One string per document.
        tokenizer: Must have an ``eos_token``, which also fills the last row if there is no ``pad_token``.
        length: Tokens per row.
        vocab_size: Size of the model's vocabulary, where it is to be checked.

    Raises:
        ValueError: the tokenizer has no end-of-text token, no document has text, or a token is outside the vocabulary.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which separates documents: set tokenizer.eos_token.")
    kept = [text for text in texts if text]
    encoded = tokenizer(kept, add_special_tokens=False)["input_ids"] if kept else []
    documents = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    n_tokens = sum(map(len, documents))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pack_tokens(
        documents,
        length=length,
        pad_id=pad_id,
        vocab_size=vocab_size,
        bytes_per_token=sum(len(text.encode()) for text in kept) / n_tokens if n_tokens else None,
    )


def pack_tokens(
    documents: Iterable[Sequence[int]],
    *,
    length: int,
    pad_id: int,
    vocab_size: int | None = None,
    bytes_per_token: float | None = None,
) -> PackedDataset:
    """Pack token ids: documents in their order, each row filled to the end.

    A document that reaches beyond its row goes on in the next one as a document of its own. Documents of fewer than two
    tokens hold no target and are left out, and so are rows without any.

    Args:
        documents: Token ids of each document.
        length: Tokens per row.
        pad_id: Token that fills the last row.
        vocab_size: Size of the model's vocabulary, where it is to be checked.
        bytes_per_token: Kept in the dataset.

    Raises:
        ValueError: rows of fewer than two tokens, no document of at least two, or a token outside the vocabulary.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a row needs a token to predict from and one to predict.")
    kept = [np.asarray(document, dtype=np.int64) for document in documents if len(document) >= 2]
    if not kept:
        raise ValueError(
            "The dataset is empty: no document has at least 2 tokens. Check the paths or the filter of the data."
        )
    stream = np.concatenate(kept)
    _check_vocabulary(stream, vocab_size)

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

    labels = labels.reshape(n_rows, length)
    has_target = (labels != IGNORED).any(1)
    input_rows, label_rows, position_rows = (
        torch.from_numpy(array.reshape(n_rows, length)[has_target]) for array in (input_ids, labels, position_ids)
    )
    return PackedDataset(input_rows, label_rows, position_rows, bytes_per_token)


def _check_vocabulary(stream: np.ndarray, vocab_size: int | None) -> None:
    largest = int(stream.max())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"Token {largest} is outside the model's vocabulary of {vocab_size} tokens: use the model's own tokenizer, "
            f"or a model with at least {largest + 1} tokens."
        )
