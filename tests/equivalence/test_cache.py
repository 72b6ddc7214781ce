"""Cached decoding along a path = chunked prefill = one uncached pass: every family, any path, padding on either side.

In fp64, where rounding is 1e-15 and any error in bookkeeping is visible; once more in fp32 with transformers' own delta rules.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXACT, FAMILIES, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import MullForCausalLM, from_actions, from_layers, wrap_transformer_with_etd
from mull.model.path import Path

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
TOKENS = 19


def chunked(
    model: MullForCausalLM, tokens: Tensor, sizes: list[int], mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Logits of `tokens` fed in pieces through one cache."""
    cache = model.new_cache()
    logits, start = [], 0
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        end = start + size
        more: dict[str, Any] = {}
        if mask is not None and position_ids is not None:
            more = {"attention_mask": mask[:, :end], "position_ids": position_ids[:, start:end]}
        logits.append(model(tokens[:, start:end], past_key_values=cache, **more, **options).logits)
        start = end
    assert start == tokens.shape[1]
    return torch.cat(logits, 1)


SCHEDULES = {
    "token-by-token": [1] * TOKENS,
    "prefill-then-decode": [8] + [1] * (TOKENS - 8),
    "chunks": [5, 1, 7, 2, 4],
}


def random_path(seed: int, n_layers: int = 8) -> Path:
    """Each layer skipped, executed or repeated; even seeds skip the first layer, which transformers' cache counts tokens in."""
    chooser = random.Random(seed)
    actions = [chooser.choice([0, 1, 1, 2]) for _ in range(n_layers)]
    if seed % 2 == 0:
        actions[0] = 0
    return from_actions(actions) if any(actions) else from_layers([3])


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.latin(12, "family", "iterations", "schedule")
def test_cached_is_uncached_for_every_number_of_iterations(
    family: str, iterations: int, schedule: str, exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens = ids(2, TOKENS)
    expected = model(tokens, use_cache=False, think_iterations=iterations).logits
    actual = chunked(model, tokens, SCHEDULES[schedule], think_iterations=iterations)
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.latin(12, "family", "seed")
def test_cached_is_uncached_along_random_paths(family: str, seed: int, exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), None)
    tokens, path = ids(2, TOKENS), random_path(seed)
    expected = model(tokens, use_cache=False, path=path).logits
    for sizes in SCHEDULES.values():
        torch.testing.assert_close(chunked(model, tokens, sizes, path=path), expected, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("path", [[2, 0, 2, 1], [3], [7, 3, 3, 0]], ids=str)
@pytest.mark.latin(3, "family", "path")
def test_paths_may_reorder_layers_and_leave_kinds_of_layers_out(
    family: str, path: list[int], exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family), None)
    tokens, visits = ids(2, TOKENS), from_layers(path)
    expected = model(tokens, use_cache=False, path=visits).logits
    for sizes in SCHEDULES.values():
        torch.testing.assert_close(chunked(model, tokens, sizes, path=visits), expected, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.latin(8, "family", "iterations", "schedule")
def test_left_padded_rows_are_the_rows_alone(
    family: str, iterations: int, schedule: str, exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens, lengths = ids(3, TOKENS), [TOKENS, 11, 3]
    mask = torch.stack([torch.arange(TOKENS) >= TOKENS - length for length in lengths]).long()
    actual = chunked(model, tokens, SCHEDULES[schedule], mask, think_iterations=iterations)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, TOKENS - length :], use_cache=False, think_iterations=iterations).logits[0]
        torch.testing.assert_close(actual[row, TOKENS - length :], alone, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.latin(8, "family", "iterations", "schedule")
def test_right_padded_rows_are_the_rows_alone(
    family: str, iterations: int, schedule: str, exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens, lengths = ids(3, TOKENS), [TOKENS, 11, 3]
    mask = torch.stack([torch.arange(TOKENS) < length for length in lengths]).long()
    actual = chunked(model, tokens, SCHEDULES[schedule], mask, think_iterations=iterations)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length], use_cache=False, think_iterations=iterations).logits[0]
        torch.testing.assert_close(actual[row, :length], alone, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[6, 4, 3], [6, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("family_name", [name for name in FAMILIES if name != "olmo3"])  # its sliding windows refuse it
def test_rows_continue_behind_right_padding(family_name: str, sizes: list[int], exact: Exact, ids: Ids) -> None:
    """A right-padded prompt is prefilled, then every row goes on: padding stays inside the cache and must leave no trace."""
    model = wrap_transformer_with_etd(exact(family_name), SPLIT)
    tokens = ids(3, sum(sizes))
    mask = torch.ones_like(tokens)
    mask[1, 4 : sizes[0]] = 0
    mask[2, 1 : sizes[0]] = 0
    actual = chunked(model, tokens, sizes, mask, think_iterations=2)
    for row in range(3):
        real = mask[row] == 1
        alone = model(tokens[row : row + 1, real], use_cache=False, think_iterations=2).logits[0]
        torch.testing.assert_close(actual[row, real], alone, atol=EXACT, rtol=0)


def test_sliding_windows_refuse_tokens_after_right_padding(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("olmo3"), SPLIT)
    tokens = ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 4:8] = 0
    cache = model.new_cache()
    model(tokens[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    with pytest.raises(ValueError, match="continues after right padding.*Pad on the left"):
        model(tokens[:, 8:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.latin(3, "family", "schedule")
def test_cached_is_uncached_in_fp32_with_transformers_own_rules(family: str, schedule: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family, initializer_range=0.05), SPLIT)
    tokens = ids(2, TOKENS)
    expected = model(tokens, use_cache=False, think_iterations=3).logits
    actual = chunked(model, tokens, SCHEDULES[schedule], think_iterations=3)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_slot_for_every_visit_and_all_of_one_length(family: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    cache = model(ids(2, 9), think_iterations=3, use_cache=True).past_key_values
    assert cache is not None
    assert len(cache) == 2 + 3 * 4 + 2
    assert cache.get_seq_length() == 9
    assert {slot.get_seq_length() for slot in cache.layers if hasattr(slot, "keys")} == {9}


@torch.no_grad()
def test_another_path_on_a_used_cache_is_refused(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    cache = model(ids(2, 9), think_iterations=3, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 9 tokens that ran 16 layer visits, but the call asks for 12"):
        model(ids(2, 1), think_iterations=2, past_key_values=cache)
    cache.reset()
    model(ids(2, 1), think_iterations=2, past_key_values=cache)
    assert cache.get_seq_length() == 1


@torch.no_grad()
def test_rows_are_selected_repeated_and_reordered_in_every_slot(family: str, exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens, more = ids(3, 11), ids(4, 5, seed=1)
    rows = torch.tensor([2, 0, 0, 1])
    expected = model(torch.cat([tokens[rows], more], 1), use_cache=False, think_iterations=3).logits[:, 11:]
    for operation in ("reorder_cache", "batch_select_indices"):
        cache = model(tokens, think_iterations=3, use_cache=True).past_key_values
        getattr(cache, operation)(rows)
        actual = model(more, think_iterations=3, past_key_values=cache).logits
        torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)
    cache = model(tokens[:2], think_iterations=3, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    twice = torch.cat([tokens[:2].repeat_interleave(2, 0), more], 1)
    expected = model(twice, use_cache=False, think_iterations=3).logits[:, 11:]
    actual = model(more, think_iterations=3, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)
