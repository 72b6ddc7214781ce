"""No position sees the future, another row or padding: perturbing them changes nothing, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor

from mull import from_actions, wrap_transformer_with_etd

Ids = Callable[..., Tensor]
PATHS = {"loops": None, "skips-and-repeats": from_actions([0, 2, 1, 0, 2, 1, 2, 1])}


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.latin(2, "family", "path", "use_cache")
def test_the_last_token_reaches_no_earlier_position(family: str, path: str, use_cache: bool, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    options = {"use_cache": use_cache, "path": PATHS[path]}
    tokens = ids(2, 21)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 97
    before, after = model(tokens, **options).logits, model(other, **options).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
def test_another_row_changes_nothing(family: str, use_cache: bool, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    tokens = ids(3, 21)
    other = tokens.clone()
    other[1] = ids(1, 21, seed=9)[0]
    before = model(tokens, use_cache=use_cache, think_iterations=3).logits
    after = model(other, use_cache=use_cache, think_iterations=3).logits
    # Experts batch their tokens across rows, so sums may associate differently there.
    tolerance = 1e-5 if "moe" in family else 0.0
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], atol=tolerance, rtol=0)
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.latin(2, "family", "side", "use_cache")
def test_what_stands_in_the_padding_changes_nothing(family: str, side: str, use_cache: bool, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    tokens = ids(2, 21)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 8) if side == "left" else slice(13, None)] = 0
    other = torch.where(mask == 1, tokens, ids(2, 21, seed=5))
    options = {"attention_mask": mask, "use_cache": use_cache, "think_iterations": 3}
    before, after = model(tokens, **options).logits, model(other, **options).logits
    tolerance = 1e-5 if "moe" in family else 0.0
    torch.testing.assert_close(before[mask == 1], after[mask == 1], atol=tolerance, rtol=0)
