"""Taking back any number of wrong tokens leaves the cache as if they had never been fed: full, sliding and recurrent slots."""

from collections.abc import Callable

import pytest
import torch
from conftest import EXACT, HYBRIDS, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import SlotCache, wrap_transformer_with_etd

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]


@torch.no_grad()
@pytest.mark.parametrize(
    ("prompt", "calls"),
    [(prompt, calls) for prompt in (1, 2, 11) for calls in ([5], [1] * 5, [2, 1, 2])],
    ids=str,
)
@pytest.mark.latin(14, "family", "prompt", "calls")
def test_wrong_tokens_leave_no_trace(family: str, prompt: int, calls: list[int], exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    right, wrong, rest = ids(2, prompt), ids(2, 5, seed=1), ids(2, 2, seed=2)
    for n_wrong in range(6):
        n_accepted = 5 - n_wrong
        kept = torch.cat([right, wrong[:, :n_accepted]], 1)
        expected = model(torch.cat([kept, rest], 1), use_cache=False, think_iterations=2).logits[:, kept.shape[1] :]
        cache = model(right, use_cache=True, think_iterations=2).past_key_values
        cache.activate_past_recording()
        for tokens in wrong.split(calls, dim=1):
            model(tokens, past_key_values=cache, think_iterations=2)
        cache.crop(-n_wrong)
        assert cache.get_seq_length() == kept.shape[1]
        actual = torch.cat(
            [model(token, past_key_values=cache, think_iterations=2).logits for token in rest.split(1, 1)], 1
        )
        torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family_name", HYBRIDS)
def test_everything_can_be_taken_back(family_name: str, exact: Exact, ids: Ids) -> None:
    """Recording from the first token on, down to an empty cache."""
    model = wrap_transformer_with_etd(exact(family_name), SPLIT)
    tokens, other = ids(2, 9), ids(2, 6, seed=1)
    expected = model(other, use_cache=False, think_iterations=2).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens, past_key_values=cache, think_iterations=2)
    cache.crop(-9)
    actual = torch.cat(
        [model(part, past_key_values=cache, think_iterations=2).logits for part in other.split([1, 5], 1)], 1
    )
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family_name", HYBRIDS)
def test_recurrent_states_equal_a_fresh_prefill(family_name: str, ids: Ids) -> None:
    """In fp32 with transformers' own rules: what the replay computes is the state, not just something that decodes alike."""
    model = wrap_transformer_with_etd(tiny(family_name, initializer_range=0.05), SPLIT)
    tokens = ids(2, 20)
    fresh = model(tokens[:, :14], use_cache=True, think_iterations=2).past_key_values
    cache = model(tokens[:, :9], use_cache=True, think_iterations=2).past_key_values
    cache.activate_past_recording()
    model(tokens[:, 9:], past_key_values=cache, think_iterations=2)
    cache.crop(-6)
    compared = 0
    for actual, expected in zip(cache.layers, fresh.layers, strict=True):
        if hasattr(actual, "recurrent_states"):
            torch.testing.assert_close(actual.recurrent_states[0], expected.recurrent_states[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(actual.conv_states[0], expected.conv_states[0], atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared >= 6


@torch.no_grad()
def test_rollback_behind_right_padding(exact: Exact, ids: Ids) -> None:
    """Rows of different lengths, inside one recorded call: each goes back to its own state."""
    model = wrap_transformer_with_etd(exact("qwen3_5"), SPLIT)
    tokens, rest = ids(2, 12), ids(2, 3, seed=1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 7:10] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model.new_cache()
    cache.activate_past_recording()
    options = {"past_key_values": cache, "think_iterations": 2}
    model(tokens[:, :4], **options)
    model(tokens[:, 4:12], attention_mask=mask[:, :12], position_ids=positions[:, 4:12], **options)
    cache.crop(-2)
    actual = model(rest, attention_mask=mask, position_ids=positions[:, 10:13], **options).logits
    for row in range(2):
        kept = tokens[row, :10][mask[row, :10] == 1]
        alone = model(torch.cat([kept, rest[row]])[None], use_cache=False, think_iterations=2).logits[0, -3:]
        torch.testing.assert_close(actual[row], alone, atol=EXACT, rtol=0)


@torch.no_grad()
def test_rows_selected_while_recording_roll_back_to_their_own_past(family: str, exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    right, wrong, rest, rows = ids(3, 9), ids(3, 5, seed=1), ids(2, 2, seed=2), torch.tensor([2, 0])
    kept = torch.cat([right, wrong[:, :2]], 1)[rows]
    expected = model(torch.cat([kept, rest], 1), use_cache=False, think_iterations=2).logits[:, 11:]
    cache = model(right, use_cache=True, think_iterations=2).past_key_values
    cache.activate_past_recording()
    model(wrong, past_key_values=cache, think_iterations=2)
    cache.batch_select_indices(rows)
    cache.crop(-3)
    actual = model(rest, past_key_values=cache, think_iterations=2).logits
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)


def filled(family_name: str, ids: Ids) -> SlotCache:
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    with torch.no_grad():
        cache: SlotCache = model(ids(2, 9), use_cache=True, think_iterations=2).past_key_values
    return cache


@pytest.mark.parametrize("family_name", ["qwen3_5", "olmo3"])
def test_taking_back_unrecorded_tokens_is_refused_and_changes_nothing(family_name: str, ids: Ids) -> None:
    cache = filled(family_name, ids)
    with pytest.raises(RuntimeError, match="recorded 0 since the last crop. Call cache.activate_past_recording"):
        cache.crop(-1)
    assert cache.get_seq_length() == 9
    assert {slot.get_seq_length() for slot in cache.layers if hasattr(slot, "keys")} == {9}


def test_crop_takes_a_negative_number_within_the_cache(ids: Ids) -> None:
    cache = filled("qwen3", ids)
    with pytest.raises(ValueError, match=r"crop\(-3\)"):
        cache.crop(3)
    with pytest.raises(ValueError, match="Cannot take back 10 tokens: the cache holds 9"):
        cache.crop(-10)
    cache.crop(-4)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("family_name", ["qwen3", "olmo3", *HYBRIDS])
@pytest.mark.latin(2, "family_name")
def test_assisted_generation_of_transformers_is_lossless(family_name: str, ids: Ids) -> None:
    """Prompt lookup drafts wrong tokens on random models all the time; transformers refuses it on its own hybrids."""
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    prompt = ids(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 24, "do_sample": False, "think_iterations": 2, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    actual = model.generate(prompt, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(actual, expected)
