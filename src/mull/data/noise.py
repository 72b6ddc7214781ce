"""Plant noise into packed documents, to measure whether a training method avoids it.

Rho-1 trains on the tokens from which a model can still learn (arXiv:2404.07965). In natural text these are not known. A planted
token, however, cannot be predicted from anything, so a good selection skips it. The mask of planted tokens is for measuring
only; the method must not see it.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mull.data.packing import PackedDataset
from mull.ops.targets import IGNORED


def plant_noise(
    dataset: PackedDataset,
    share: float,
    *,
    vocab_size: int,
    special_ids: Collection[int],
    seed: int = 0,
    where: Literal["labels", "tokens"] = "labels",
) -> tuple[PackedDataset, Bool[Tensor, "N T"]]:
    """Replace a share of the targets by tokens drawn uniformly from the rest of the vocabulary.

    Args:
        dataset: Packed documents; not changed.
        share: Share of the targets that are not special to replace, from 0 to 1. The number of targets is exact, after rounding.
        vocab_size: Replacements are drawn from ``0 .. vocab_size - 1``, except special tokens and the replaced token itself.
        special_ids: Tokens that are neither replaced nor drawn, such as padding and the end of a text.
        seed: Not negative. Equal seeds plant equal noise.
        where: ``labels`` changes only what is predicted, so noise has no other effect. ``tokens`` also changes the input, as in a
            corpus with wrong tokens, which makes the tokens after them harder to predict.

    Returns:
        The noisy dataset, and a mask that is True where a label was replaced. The noise is the same in every epoch, so a
        model can memorise it. ``bytes_per_token`` is None, because the texts have changed.

    Raises:
        ValueError: `share` is not in [0, 1], `seed` is negative, or fewer than two tokens are not special.
    """
    drawable = np.setdiff1d(np.arange(vocab_size), np.asarray([*special_ids], dtype=np.int64))
    if not 0 <= share <= 1 or seed < 0:
        raise ValueError(f"share={share} must lie in [0, 1] and seed={seed} must not be negative.")
    if len(drawable) < 2:
        raise ValueError(
            f"vocab_size={vocab_size} leaves {len(drawable)} tokens that are not special: noise needs 2 or more."
        )
    labels = dataset.labels.numpy()
    candidates = np.flatnonzero((labels != IGNORED) & ~np.isin(labels, np.asarray([*special_ids], dtype=np.int64)))
    rng = np.random.default_rng(seed)
    chosen = rng.choice(candidates, size=round(share * len(candidates)), replace=False)
    mask = np.zeros(labels.shape, dtype=bool)
    mask.flat[chosen] = True

    # Draw among all but the last, and replace the token itself by the last: uniform over the other tokens.
    drawn = drawable[rng.integers(len(drawable) - 1, size=len(chosen))]
    noise = np.where(drawn == labels.flat[chosen], drawable[-1], drawn)
    changed = {"labels": dataset.labels.clone()}
    if where == "tokens":
        changed["input_ids"] = dataset.input_ids.clone()
    for tensor in changed.values():
        tensor.view(-1)[torch.from_numpy(chosen)] = torch.from_numpy(noise)
    return replace(dataset, **changed, bytes_per_token=None), torch.from_numpy(mask)
