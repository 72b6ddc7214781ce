"""A row of a batch may have its own seed, and its own end."""

import pytest
import torch
from conftest import SPLIT, tiny

from mull import generate, wrap_transformer_with_etd


@pytest.fixture
def model() -> object:
    return wrap_transformer_with_etd(tiny("llama", dtype=torch.float64), SPLIT)


def test_with_seeds_of_their_own_rows_do_not_depend_on_the_others(model, ids) -> None:
    options = {"max_new_tokens": 10, "temperature": 1.0, "eos_token_id": ()}
    prompts = ids(4, 6)
    whole = generate(model, prompts, seed=[5, 6, 7, 5], **options).sequences
    for row in range(4):
        alone = generate(model, prompts[row : row + 1], seed=[(5, 6, 7, 5)[row]], **options).sequences
        assert torch.equal(alone[0], whole[row])
    pair = generate(model, prompts[[2, 1]], seed=[7, 6], **options).sequences
    assert torch.equal(pair, whole[[2, 1]])
    same = generate(model, prompts[[0, 0]], seed=[5, 6], **options).sequences
    assert not torch.equal(same[0], same[1])


def test_a_row_ends_where_its_tokens_say(model, ids) -> None:
    plain = generate(model, ids(3, 5), max_new_tokens=12, eos_token_id=()).sequences[:, 5:]
    stops = [row[index].item() for index, row in zip((2, 5, 11), plain, strict=True)]
    found = generate(
        model, ids(3, 5), max_new_tokens=12, eos_token_id=(), stop=lambda tokens: tokens[-1] in stops
    ).sequences[:, 5:]
    for row, reference in zip(found.tolist(), plain.tolist(), strict=True):
        end = next(index for index, token in enumerate(reference) if token in stops) + 1
        assert row[:end] == reference[:end]
        assert set(row[end:]) <= {0}


def test_seeds_and_stops_are_checked(model, ids) -> None:
    with pytest.raises(ValueError, match="seed has 1 numbers for 2 rows: give one for each row"):
        generate(model, ids(2, 3), max_new_tokens=2, seed=[1])
    with pytest.raises(ValueError, match="seed=-1"):
        generate(model, ids(2, 3), max_new_tokens=2, temperature=1.0, seed=[1, -1])
    with pytest.raises(TypeError, match="stop is"):
        generate(model, ids(1, 3), max_new_tokens=2, stop="\n")
