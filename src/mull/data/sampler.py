"""Shuffled batches by number. Resuming a run means continuing at a number; there is no state to save."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mull.runtime.arguments import require


@runtime_checkable
class RowDataset(Protocol):
    """Rows that can be fetched by index."""

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B]."""


class ShuffledBatches:
    """Batch number -> batch, a pure function of the number and the seed.

    Every epoch is a random order of all rows. Epochs follow each other without a gap: the last batch of one is completed from the
    next, so that every row is used exactly once per epoch, whatever the batch size.

    Args:
        dataset: Rows to draw from.
        batch_size: Rows per batch.
        seed: Not negative.
        numbered: Whether batches also have ``row_numbers [B]``, by which records about the rows are found.

    Raises:
        ValueError: the dataset has fewer rows than a batch, or the batch size or the seed is out of range.
    """

    def __init__(self, dataset: RowDataset, batch_size: int, seed: int = 0, numbered: bool = False) -> None:
        require("batch_size", batch_size, int, "a whole number")
        require("seed", seed, int, "a whole number")
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size={batch_size} must be positive, and seed={seed} must not be negative.")
        if len(dataset) < batch_size:
            raise ValueError(
                f"The dataset has {len(dataset)} rows, fewer than batch_size={batch_size}: "
                "use a smaller batch, shorter rows or more data."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.numbered = numbered
        self._cached_epoch = 0
        self._cached_order = self._draw_order(0)

    def __call__(self, index: int) -> dict[str, Tensor]:
        """The batch with this number, from 0."""
        if index < 0:
            raise ValueError(f"index={index} must not be negative: batches are numbered from 0.")
        epoch, start = divmod(index * self.batch_size, len(self.dataset))
        indices = self._order(epoch)[start : start + self.batch_size]
        if missing := self.batch_size - len(indices):
            indices = np.concatenate([indices, self._order(epoch + 1)[:missing]])
        numbers = torch.from_numpy(indices)
        batch = self.dataset.rows(numbers)
        return {**batch, "row_numbers": numbers} if self.numbered else batch

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._cached_epoch:
            self._cached_order, self._cached_epoch = self._draw_order(epoch), epoch
        return self._cached_order

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
