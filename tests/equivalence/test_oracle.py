"""A loop through mull = a loop made by hooks on an unmodified Hugging Face model, which knows nothing of paths or families.

The hooks replay each block layer's own keyword arguments, so masks and rotary embeddings are the backbone's own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import wrap_transformer_with_etd


def loop_with_hooks(model: PreTrainedModel, first: int, end: int, iterations: int) -> None:
    """Make layers ``[first, end)`` of an unmodified model run `iterations` times (without cache)."""
    calls: dict[int, dict[str, Any]] = {}
    inside = []

    def remember(index: int) -> Callable[..., None]:
        def hook(module: object, args: object, kwargs: dict[str, Any]) -> None:
            if not inside:
                calls[index] = kwargs

        return hook

    def repeat(module: object, args: object, kwargs: object, out: Tensor) -> Tensor:
        if inside:
            return out
        inside.append(1)
        for _ in range(iterations - 1):
            for index in range(first, end):
                out = model.model.layers[index](out, **calls[index])
        inside.clear()
        return out

    for index in range(first, end):
        model.model.layers[index].register_forward_pre_hook(remember(index), with_kwargs=True)
    model.model.layers[end - 1].register_forward_hook(repeat, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 3])
def test_three_iterations_equal_the_hooked_base_model(family: str, iterations: int, ids: Callable[..., Tensor]) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    actual = model(tokens, attention_mask=mask, think_iterations=iterations, use_cache=False).logits
    base = tiny(family)
    loop_with_hooks(base, 2, 6, iterations)
    expected = base(tokens, attention_mask=mask, use_cache=False).logits
    assert torch.equal(actual, expected)
