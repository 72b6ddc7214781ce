"""What the layers of one call share: masks, rotary embeddings, positions and documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from mull.model.families import Family, layer_kinds
from mull.model.fixed_cache import StaticCall
from mull.model.growing_cache import SlotCache


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed batch stand. S documents, L tokens in the longest."""

    index: Tensor
    """``[S, L]``: flat position ``row * T + column`` of each token; 0 behind the end of a document."""

    inverse: Tensor
    """``[B * T]``: flat position in ``[S, L]`` of each token of the batch."""

    def run(self, layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """Run a causal layer on each document as a row of its own; what stands behind a document's end cannot reach it."""
        rows = h.flatten(0, 1)[self.index]  # (S, L, D)
        return layer(rows).flatten(0, 1)[self.inverse].view_as(h)


def is_packed(position_ids: Tensor) -> bool:
    """Whether `position_ids` ``[B, T]`` restart inside a row. Not asked while compiling, where values cannot be read."""
    if torch.compiler.is_compiling() or position_ids.shape[1] == 1:
        return False
    return bool((position_ids.diff(dim=1) != 1).any())


def find_documents(position_ids: Tensor, batch_size: int) -> Documents | None:
    """Locate packed documents by the restarts of `position_ids` ``[B, T]``; None if every row is one document.

    The rule is that of transformers: a position that is not its predecessor's plus one begins a document.
    """
    document = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
    if document is None:
        return None
    document = document + torch.arange(batch_size, device=document.device)[:, None] * document.shape[1]
    _, number, length = document.flatten().unique_consecutive(return_inverse=True, return_counts=True)
    start = length.cumsum(0) - length
    offset = torch.arange(number.numel(), device=number.device) - start[number]
    columns = torch.arange(int(length.max()), device=number.device)
    index = torch.where(columns < length[:, None], start[:, None] + columns, 0)
    return Documents(index, number * index.shape[1] + offset)


@dataclass(frozen=True)
class Sides:
    """Everything besides the hidden states that the layers of one call need."""

    masks: dict[str, Any]
    """Attention mask by kind of layer."""

    rotary: dict[str, Any]
    """Position embeddings by kind of layer."""

    position_ids: Tensor
    documents: Documents | None = None
    """Packed documents, for recurrent layers."""

    active: Tensor | None = None
    """``[B, T]``, False for padding behind a token, which must not reach recurrent states; None where there is none."""


def prepare(
    base: Any,
    family: Family,
    h: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    cache: SlotCache | None,
) -> Sides:
    """Compute masks and rotary embeddings of a call.

    Args:
        base: The backbone.
        family: Its entry of `FAMILIES`.
        h: Embeddings ``[B, T, D]``.
        attention_mask: ``[B, past + T]`` with 0 at padding, ``[B, 1, T, past + T]`` boolean, or masks by kind of layer.
        position_ids: ``[B, T]``; None counts from the tokens in the cache. Without mask and cache, a restart begins a document.
        cache: Cache whose slots are already bound, or None.

    Raises:
        ValueError: a mask of a shape that the backbone cannot obey.
    """
    config = base.config
    kinds = set(layer_kinds(config))
    past = 0 if cache is None else cache.n_tokens
    if isinstance(attention_mask, Tensor):
        _check_mask(attention_mask, past + h.shape[1], "linear_attention" in kinds)
    may_be_packed = position_ids is not None and attention_mask is None and cache is None
    if position_ids is None:
        position_ids = (torch.arange(h.shape[1], device=h.device) + past)[None]
    masks: Any = attention_mask
    if not isinstance(attention_mask, dict):
        masks = create_masks_for_generate(
            config=config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
    if not isinstance(masks, dict):
        masks = dict.fromkeys(kinds, masks)
    rotary = family.rotary(base, kinds, h, position_ids)
    if "linear_attention" not in kinds or isinstance(attention_mask, dict):
        return Sides(masks, rotary, position_ids)
    padding, active = _recurrent_padding(attention_mask, h.shape[1], cache is not None)
    documents = find_documents(position_ids, h.shape[0]) if may_be_packed else None
    return Sides({**masks, "linear_attention": padding}, rotary, position_ids, documents, active)


def prepare_static(base: Any, family: Family, h: Tensor, call: StaticCall) -> Sides:
    """Compute masks and rotary embeddings of a call on a `mull.model.fixed_cache.StaticSlotCache`.

    Nothing here waits for the device, so the call can be compiled or captured.

    Args:
        base: The backbone.
        family: Its entry of `FAMILIES`.
        h: Embeddings ``[B, T, D]``.
        call: Where the tokens stand.

    Raises:
        ValueError: the backbone uses an attention that is neither sdpa nor eager.
    """
    config = base.config
    attention = config._attn_implementation
    if attention not in STATIC_ATTENTIONS:
        raise ValueError(
            f"Attention {attention!r} cannot look into a cache of fixed size. Load the model with attn_implementation='sdpa' "
            "(or 'eager')."
        )
    kinds = set(layer_kinds(config))
    n_new = h.shape[1]
    key = torch.arange(n_new if call.fresh else call.n_keys, device=h.device)
    position = call.positions[:, None, :, None]
    masks: dict[str, Tensor | None] = dict.fromkeys(kinds)
    for kind in kinds - {"linear_attention"}:
        window = config.sliding_window if kind == "sliding_attention" else None
        reach = n_new if call.fresh else call.n_keys
        if (call.fresh or call.sees_all) and attention == "sdpa" and (window is None or reach <= window):
            continue  # without a mask, sdpa is causal by itself, and a single token sees all
        visible = key <= position  # (B, 1, T, keys)
        if window is not None:
            visible = visible & (key > position - window)
        masks[kind] = visible if attention == "sdpa" else _additive(visible, h.dtype)
    return Sides(masks, family.rotary(base, kinds, h, call.positions), call.positions)


STATIC_ATTENTIONS = ("sdpa", "eager")
"""Implementations of attention that obey a mask per row over more keys than there are queries."""


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _check_mask(mask: Tensor, n_keys: int, recurrent: bool) -> None:
    if mask.ndim == 2 and mask.shape[1] != n_keys:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {n_keys}: it has to cover those in the cache and the "
            "new ones."
        )
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; use [batch, tokens] or [batch, 1, queries, keys]."
        )
    if mask.ndim == 4 and recurrent:
        raise ValueError(
            "Recurrent layers cannot obey a 4-dimensional attention_mask. Use a [batch, tokens] mask for padding, and "
            "position_ids that restart for packed documents."
        )


def _recurrent_padding(mask: Tensor | None, n_new: int, cached: bool) -> tuple[Tensor | None, Tensor | None]:
    """Padding mask of the new tokens for recurrent layers, and which tokens are active if rows have to be compacted.

    transformers drops the mask of a single token; a left-padded row that is fed token by token would then read its padding.
    """
    if mask is None:
        return None, None
    new = mask[:, -n_new:].contiguous()
    if not torch.compiler.is_compiling() and bool((new == 1).all()):
        return None, None
    compacted_rows = ((new == 0) & (mask.cumsum(1)[:, -n_new:] > 0)).any(1, keepdim=True)
    if cached and bool(compacted_rows.any()):
        return new, (new == 1) | ~compacted_rows
    return new, None


def check_not_behind_padding(mask: Tensor | None, n_new: int, config: PreTrainedConfig) -> None:
    """Refuse tokens that follow right padding where sliding windows count tokens by their place in the cache.

    Raises:
        ValueError: the model has sliding-window layers and a row continues behind padding.
    """
    if mask is None or mask.ndim != 2 or mask.shape[1] == n_new or "sliding_attention" not in layer_kinds(config):
        return
    if mask.shape[1] <= config.sliding_window:
        return
    gap = (mask == 0) & (mask.cumsum(1) > 0)
    if bool((gap[:, :-n_new].any(1) & (mask[:, -n_new:] == 1).any(1)).any()):
        raise ValueError(
            "A row continues behind right padding, but the sliding windows of this model count tokens by their place in the "
            "cache, padding included. Pad on the left."
        )
