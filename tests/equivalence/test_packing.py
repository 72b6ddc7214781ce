"""Packed documents are the documents alone: neither attention nor a recurrent state crosses a boundary, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import wrap_transformer_with_etd
from mull.model.inputs import find_documents

LENGTHS = [[5, 1, 9, 8], [23], [11, 12]]


def packed_positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.latin(8, "family", "iterations")
def test_packed_is_separate(
    family: str, iterations: int, exact: Callable[..., PreTrainedModel], ids: Callable[..., Tensor]
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens = ids(3, 23)
    options = {"use_cache": False, "think_iterations": iterations}
    actual = model(tokens, position_ids=packed_positions(), **options).logits
    weights = torch.randn(actual.shape, dtype=actual.dtype)
    (actual * weights).sum().backward()
    packed_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(tokens[row : row + 1, part], **options).logits[0]
            torch.testing.assert_close(actual[row, part], alone, atol=EXACT, rtol=0)
            (alone * weights[row, part]).sum().backward()
            start += length
    for name, parameter in model.named_parameters():
        # transformers computes decay and norms in fp32 whatever the model's precision: 2e-7 of the largest entry, measured, or
        # 2e-7 where all entries are small.
        tolerance = 1e-6 * max(parameter.grad.abs().max().item(), 1)
        torch.testing.assert_close(
            packed_gradients[name], parameter.grad, atol=tolerance, rtol=0, msg=f"gradient of {name}"
        )


@torch.no_grad()
def test_packed_rows_are_apart_by_default_and_never_cached(family: str, ids: Callable[..., Tensor]) -> None:
    """The base model leaks here: its default use_cache=True switches its own detection of packed rows off."""
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    tokens = ids(3, 23)
    out = model(tokens, position_ids=packed_positions())
    assert out.past_key_values is None
    other = tokens.clone()
    other[0, :5] = ids(1, 5, seed=8)[0]
    changed = model(other, position_ids=packed_positions()).logits
    # Experts batch their tokens across documents, so sums may associate differently there.
    torch.testing.assert_close(changed[0, 5:], out.logits[0, 5:], atol=1e-5 if "moe" in family else 0.0, rtol=0)
    for options in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(ValueError, match="several packed documents, and these cannot continue from a cache"):
            model(tokens, position_ids=packed_positions(), **options)


def test_documents_are_located_by_restarts() -> None:
    documents = find_documents(packed_positions(), 3)
    assert documents is not None
    assert documents.index.shape == (7, 23)
    assert documents.index[2, :9].tolist() == list(range(6, 15))
    assert documents.index.flatten()[documents.inverse].tolist() == list(range(3 * 23))
    assert find_documents(torch.arange(23)[None], 3) is None
