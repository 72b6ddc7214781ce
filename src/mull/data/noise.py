"""Plant noise into packed documents, to see whether a training method finds it.

Rho-1 trains on the tokens from which a model can still learn (arXiv:2404.07965). Which tokens those are is not known in natural
text; here it is: a planted token cannot be predicted from anything, so a method that selects well passes it over. The mask is
there to measure that, and must not be shown to the method.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mull.data.packing import IGNORED, PackedDataset


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
        share: Share of the targets to replace, from 0 to 1, of those that are not special. Exactly this many are, rounded to the
            nearest number.
        vocab_size: Replacements are drawn from ``0 .. vocab_size - 1``, without the special tokens and the token itself.
        special_ids: Such as padding and the end of a text: neither replaced nor drawn.
        seed: Equal seeds plant equal noise.
        where: ``labels`` changes what is to be predicted and leaves the input as it is, so that noise does nothing else.
            ``tokens`` changes both, as in a corpus with wrong tokens: the tokens behind one are then harder, too.

    Returns:
        The noisy dataset, and a mask that is True where a label was replaced. Noise is fixed: several epochs show the same, and a
        model can learn it by heart. ``bytes_per_token`` is None, because the texts are no longer those.

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

    # One of all but the last; where that is the token itself, the last: uniform over the others.
    drawn = drawable[rng.integers(len(drawable) - 1, size=len(chosen))]
    noise = np.where(drawn == labels.flat[chosen], drawable[-1], drawn)
    changed = {"labels": dataset.labels.clone()}
    if where == "tokens":
        changed["input_ids"] = dataset.input_ids.clone()
    for tensor in changed.values():
        tensor.view(-1)[torch.from_numpy(chosen)] = torch.from_numpy(noise)
    return replace(dataset, **changed, bytes_per_token=None), torch.from_numpy(mask)
