"""Targets: which token each head predicts where, and the documents of a row."""

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a token that is not a target."""


def check_targets(labels: Shaped[Tensor, "B T *more"], n_targets: Tensor | int) -> None:
    """Refuse a batch in which no label is a target: its mean loss is not a number.

    Raises:
        ValueError: `n_targets` is 0.
    """
    if n_targets == 0:
        raise ValueError(
            f"No label of this batch of shape {tuple(labels.shape)} is a target: all are {IGNORED} after the shift by one "
            "(nothing predicts the first token of a row or document). Drop such rows from the data."
        )


def targets_of(
    labels: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None, n_heads: int
) -> Int[Tensor, "B T {n_heads}"]:
    """The token that each head predicts at each position.

    Head ``h`` at ``i`` stays within its document if and only if ``position_ids[i + 1 + h] = position_ids[i] + 1 + h``: positions
    rise by at most 1 per token and a new document lowers them, so ``h + 1`` steps add up to ``h + 1`` only if all lie within one
    document.

    Args:
        labels: Token ids, not shifted; -100 where a token is no target, as on prompts and padding.
        position_ids: Position of each token in its document. None: a row is one document. Pass them for rows that are padded on
            the left, where a head would otherwise predict the second token from padding. Padding may have any position that
            does not lead up to a token's, such as 0, or less than ``-T``.
        n_heads: Number of heads.

    Returns:
        int64 ``labels[i + 1 + h]``, and -100 beyond the row or in another document.
    """
    targets = _shifted(labels, n_heads, IGNORED)
    if position_ids is None:
        return targets.contiguous()
    distance = torch.arange(1, n_heads + 1, device=labels.device)
    same_document = _shifted(position_ids, n_heads, 0) == position_ids[..., None] + distance
    return torch.where(same_document, targets, IGNORED)


def align(scores: Shaped[Tensor, "B T"], n_heads: int) -> Shaped[Tensor, "B T {n_heads}"]:
    """Bring what describes targets, scores or a mask, to the positions that predict them.

    Args:
        scores: ``scores[b, j]`` is about token ``j``.
        n_heads: Number of heads.

    Returns:
        ``scores[b, i + 1 + h]`` in the same dtype, 0 beyond the row. Documents are not looked at: mask with `targets_of`.
    """
    return _shifted(scores.detach(), n_heads, 0).contiguous()


def valid_tokens(labels: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
    """True where a token is a target of the next-token head: it has a label, and the token before it is of its document.

    Every other head's targets are among these.
    """
    targets = targets_of(labels, position_ids, 1)[:, :-1, 0]
    return F.pad(targets != IGNORED, (1, 0))


def final_tokens(valid: Bool[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
    """True at the last target of each document; padding or an unlabelled end may follow it.

    Args:
        valid: `valid_tokens`.
        position_ids: Position of each token in its document; None: a row is one document.
    """
    documents = number_documents(valid, position_ids)
    following = F.pad(upcoming_document(valid, documents)[:, 1:], (0, 1), value=valid.shape[1])
    return valid & (following != documents)


def _shifted(tensor: Tensor, n_heads: int, beyond: int) -> Tensor:
    """``tensor[i + 1 + h]``, ``[B, T, H]``, as a view of a new tensor."""
    return F.pad(tensor[:, 1:], (0, n_heads), value=beyond).unfold(1, n_heads, 1)


def number_documents(valid: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number of each token's document in its row, from 0."""
    if position_ids is None:
        return torch.zeros_like(valid, dtype=torch.int64)
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(begins.cumsum(1), (1, 0))


def upcoming_document(valid: Tensor, documents: Tensor) -> Tensor:
    """Document of the first target at or after each token, T where none follows. Documents are numbered upwards."""
    marked = torch.where(valid, documents, valid.shape[1])
    return marked.flip(1).cummin(1).values.flip(1)


def label_positions(attention_mask: Tensor | dict[str, Any] | None, position_ids: Tensor | None) -> Tensor | None:
    """Positions by which the targets of the heads are found: no head predicts into another document, or from or into padding.

    Args:
        attention_mask: ``[B, T]`` with 0 at padding. Where there is a mask, rows are single documents, as in `forward`.
        position_ids: ``[B, T]``; without a mask, a restart begins a document.

    Returns:
        ``[B, T]`` for `mull.ops.targets.targets_of`; None where every row is one document without padding.
    """
    if attention_mask is None:
        return position_ids
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    width = attention_mask.shape[1]
    return torch.where(attention_mask == 1, attention_mask.cumsum(1), -2 * width)
