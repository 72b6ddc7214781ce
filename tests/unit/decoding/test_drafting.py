"""Claim: heads know which of their entries are final, so that a round covers what is missing and nothing more."""

import pytest
from torch import nn

from mull.decoding.drafting import HeadProgress
from mull.layers.heads import MTPHeads


def progress(kind: str, n_rows: int = 1, recursive: bool = False) -> HeadProgress:
    return HeadProgress(MTPHeads(kind, 3, 4, nn.Identity, lambda: nn.LayerNorm(4), recursive=recursive), n_rows)


def missing(heads: HeadProgress, newest: list[int], running: list[bool] | None = None) -> list[int]:
    return [heads.missing(length, newest, running or [True] * len(newest)) for length in (1, 2, 3)]


def test_chained_heads_have_guessed_one_entry_more_each() -> None:
    heads = progress("sequential")
    assert missing(heads, [9]) == [9, 9, 9]
    heads.mark(3, [9])
    assert missing(heads, [11]) == [2, 3, 4], "the example of the docstring"
    assert heads.first_missing(3) == [7]
    assert heads.first_missing(1) == [9]


@pytest.mark.parametrize(("kind", "recursive"), [("transformer", False), ("sequential", True)])
def test_parallel_and_recursive_heads_guess_nothing_in_their_window(kind: str, recursive: bool) -> None:
    heads = progress(kind, recursive=recursive)
    heads.mark(3, [9])
    assert missing(heads, [11]) == [2, 2, 2]


def test_heads_that_were_not_used_fall_behind() -> None:
    heads = progress("sequential")
    heads.mark(1, [9])
    assert missing(heads, [10]) == [1, 10, 10]
    recursive = progress("sequential", recursive=True)
    recursive.mark(1, [9])
    assert missing(recursive, [10]) == [1, 1, 1], "all drafts come from one head"


def test_pointwise_heads_have_nothing_to_miss() -> None:
    heads = progress("mlp")
    assert missing(heads, [9]) == [1, 1, 1]
    assert heads.usual(3) == 1


def test_the_running_row_that_misses_most_decides() -> None:
    heads = progress("sequential", n_rows=3)
    heads.mark(3, [9, 5, 7])
    assert missing(heads, [10, 9, 30], [True, True, False]) == [4, 5, 6]


@pytest.mark.parametrize("kind", ["sequential", "transformer"])
def test_a_round_after_one_that_drafted_misses_no_more_than_usual(kind: str) -> None:
    heads = progress(kind)
    for length in (1, 2, 3):
        heads.mark(3, [20])
        heads.mark(length, [20])
        assert heads.missing(3, [20 + 1 + length], [True]) <= heads.usual(3)
