"""Paths number their visits, and a path that does not fit is refused in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mull import from_actions, from_layers, recursion
from mull.model.path import Visit, check_path, relative_cost


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_occurrences_count_earlier_visits_of_the_same_layer(layers: list[int]) -> None:
    path = from_layers(layers)
    assert [visit.layer for visit in path] == layers
    assert [visit.occurrence for visit in path] == [layers[:i].count(layer) for i, layer in enumerate(layers)]
    assert len(set(path)) == len(path)
    assert check_path(path, 10) == path


def test_recursion_is_encode_think_decode() -> None:
    assert recursion(2, 1, 1, 3) == ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0))
    assert recursion(1, 2, 1, 2) == from_layers([0, 1, 2, 1, 2, 3])


def test_actions_skip_execute_and_repeat_in_place() -> None:
    assert from_actions([1, 0, 2]) == ((0, 0), (2, 0), (2, 1))


def test_cost_is_relative_to_one_pass() -> None:
    assert relative_cost(recursion(7, 4, 5, 5), 16) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_layers([]), "at least one layer"),
        (lambda: from_actions([0, 0]), "at least one layer"),
        (lambda: from_layers([1, -1]), "count from 0, but the path holds -1"),
        (lambda: from_actions([1, 3]), r"0 \(skip\), 1 \(execute\) or 2 \(repeat\), but got \[3\]"),
        (lambda: check_path([(9, 0)], 8), "visits layer 9, but the model has layers 0 to 7"),
        (lambda: check_path([(1, 0), (1, 0)], 8), r"visits \(1, 0\) where \(1, 1\) comes next"),
        (lambda: check_path([(1, 0, 0)], 8), "pairs"),
        (lambda: check_path([(1,)], 8), "pairs"),
    ],
)
def test_what_is_wrong_is_said(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_visits_are_named() -> None:
    assert Visit(3, 1).layer == 3
    assert Visit(3, 1).occurrence == 1
