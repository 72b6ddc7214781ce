"""A batch depends on its number and the seed alone, and every epoch uses every row exactly once."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches


def numbered(n_rows: int) -> PackedDataset:
    """A dataset whose row ``i`` holds the number ``i``."""
    rows = torch.arange(n_rows)[:, None].expand(-1, 3)
    return PackedDataset(rows, rows, rows)


def row_numbers(batches: ShuffledBatches, index: int) -> list[int]:
    batch = batches(index)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["input_ids"], batch["position_ids"])
    return batch["input_ids"][:, 0].tolist()


@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 99))
def test_every_row_once_per_epoch_whatever_the_batch_size(batch_size: int, more_rows: int, seed: int) -> None:
    n_rows, n_epochs = batch_size + more_rows, 3
    batches = ShuffledBatches(numbered(n_rows), batch_size, seed)
    stream = [row for index in range(n_epochs * n_rows) for row in row_numbers(batches, index)]
    for epoch in range(n_epochs * batch_size):
        assert Counter(stream[epoch * n_rows : (epoch + 1) * n_rows]) == Counter(range(n_rows))


def test_any_number_can_be_asked_for_at_any_time() -> None:
    in_order = ShuffledBatches(numbered(10), 4, seed=1)
    expected = [row_numbers(in_order, index) for index in range(20)]
    for index in torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist():
        assert row_numbers(in_order, index) == expected[index], "depends on what was asked before"
        assert row_numbers(ShuffledBatches(numbered(10), 4, seed=1), index) == expected[index]


def test_epochs_and_seeds_differ() -> None:
    one = ShuffledBatches(numbered(50), 50, seed=0)
    assert row_numbers(one, 0) != row_numbers(one, 1)
    assert row_numbers(one, 0) != row_numbers(ShuffledBatches(numbered(50), 50, seed=1), 0)
    assert row_numbers(one, 1) != row_numbers(ShuffledBatches(numbered(50), 50, seed=1), 0)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="3 rows, fewer than batch_size=4"):
        ShuffledBatches(numbered(3), 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        ShuffledBatches(numbered(3), 0)
    with pytest.raises(ValueError, match="seed=-1"):
        ShuffledBatches(numbered(3), 1, seed=-1)
    with pytest.raises(ValueError, match="index=-1"):
        ShuffledBatches(numbered(3), 1)(-1)
