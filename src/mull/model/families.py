"""What differs between the backbones of transformers: masks, rotary embeddings, how a decoder layer is called.

Masks and rotary embeddings are computed once per call and shared by all visits. transformers' layer code runs unmodified; the
private parts of it that mull relies on are touched here and in the caches only, and pinned by a contract test per family.

Recurrent layers need two things that attention masks give to the others for free:

* Packed documents (`position_ids` that restart): each document becomes a row of its own for the layer, so neither the
  convolution nor the state crosses a boundary.
* Padding behind a token in a cached call (right padding): the row is compacted, padding goes to its end and is a no-op there, so
  that the state that the next call continues from is the one of the tokens alone.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from mull.model.fixed_cache import StaticCall, StaticSlotView
from mull.model.growing_cache import SlotCache, SlotView

Rotary = Callable[[nn.Module, set[str], Tensor, Tensor], dict[str, Any]]
"""``(base model, layer kinds, hidden states, position_ids) -> position embeddings by layer kind``."""


def _one_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return dict.fromkeys(kinds, base.rotary_emb(h, position_ids))


def _rotary_by_kind(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return {kind: base.rotary_emb(h, position_ids, kind) for kind in kinds}


def _multimodal_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Time, height and width all advance with the text.
    return dict.fromkeys(kinds, base.rotary_emb(h, position_ids.expand(3, h.shape[0], -1)))


def _optional_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Released OlmoHybrid checkpoints have no rotary embedding.
    return dict.fromkeys(kinds, None if base.rotary_emb is None else base.rotary_emb(h, position_ids))


@dataclass(frozen=True)
class Family:
    """How one architecture differs from the others."""

    rotary: Rotary
    """Computes the position embeddings that its layers expect."""

    delta_rule_module: str | None = None
    """Module under ``transformers.models`` whose functions compute the delta rule, for architectures with recurrent layers."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_one_rotary),
    "olmo3": Family(_rotary_by_kind),
    "olmo_hybrid": Family(_optional_rotary, "olmo_hybrid.modeling_olmo_hybrid"),
    "qwen3": Family(_one_rotary),
    "qwen3_5_text": Family(_multimodal_rotary, "qwen3_5.modeling_qwen3_5"),
    "qwen3_5_moe_text": Family(_multimodal_rotary, "qwen3_5_moe.modeling_qwen3_5_moe"),
    "qwen3_next": Family(_one_rotary, "qwen3_next.modeling_qwen3_next"),
}
"""Supported architectures by their ``model_type``."""


def family_of(config: PreTrainedConfig) -> Family:
    """Look up an architecture, and prepare the functions of its recurrent layers.

    Raises:
        ValueError: the architecture is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Architecture {config.model_type!r} is not supported. Supported are {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[config.model_type]
    if family.delta_rule_module is not None:
        _adapt_recurrent_functions(importlib.import_module(f"transformers.models.{family.delta_rule_module}"))
    return family


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Kind of each decoder layer: ``full_attention``, ``sliding_attention`` or ``linear_attention``."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")


def _adapt_recurrent_functions(module: Any) -> None:
    """Let the functions that a family's recurrent layers call fit their place of work. Their numbers stay what they were.

    All of them use transformers' own torch code for tensors on the CPU: transformers chooses a kernel when it is imported, and
    with one installed its recurrent layers fail on the CPU. The keyword `cache_view`, which a layer hands on to all of them,
    takes over the call of a delta rule.
    """
    for name in (*DELTA_RULES, *CONVOLUTIONS):
        function = getattr(module, name)
        if not hasattr(function, "adapted_by_mull"):
            setattr(module, name, _adapted(function, reports=name in DELTA_RULES))


def _adapted(function: Callable[..., Any], reports: bool) -> Callable[..., Any]:
    reference = inspect.unwrap(function)

    @wraps(function)
    def adapted(first: Tensor, *args: Any, cache_view: SlotView | StaticSlotView | None = None, **kwargs: Any) -> Any:
        chosen = reference if first.device.type == "cpu" else function
        if cache_view is None or not reports:
            return chosen(first, *args, **kwargs)
        return cache_view.delta_rule(chosen, first, *args, **kwargs)

    adapted.adapted_by_mull = True  # type: ignore[attr-defined]
    return adapted


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


def new_block(base: Any, routed: bool = False) -> nn.Module:
    """A further decoder layer with full attention, of the backbone's own class and not initialised.

    Args:
        base: The backbone.
        routed: In a backbone with routed experts, build one that has them, as released multi-token modules do, even where the
            first layer with full attention has none.

    Raises:
        ValueError: the backbone has no layer with full attention to take as a pattern.
    """
    kinds = layer_kinds(base.config)
    if "full_attention" not in kinds:
        raise ValueError(
            "No layer of this model has full attention, so there is no pattern for heads of type transformer or sequential: use "
            "mlp or shared_lm_head."
        )
    patterns = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if routed:
        patterns.sort(key=lambda layer: not hasattr(base.layers[layer].mlp, "experts"))
    layer = patterns[0]
    block: nn.Module = type(base.layers[layer])(base.config, layer)
    return block


def new_norm(base: Any) -> nn.Module:
    """A further norm like the backbone's final one, not initialised."""
    norm: nn.Module = type(base.norm)(base.config.hidden_size, base.config.rms_norm_eps)
    return norm


def run_layer(layer: nn.Module, kind: str, h: Tensor, sides: Sides, view: SlotView | StaticSlotView | None) -> Tensor:
    """Run one decoder layer of transformers, unmodified, for one visit.

    Args:
        layer: The decoder layer.
        kind: Its kind.
        h: Hidden states ``[B, T, D]``.
        sides: What the call's layers share.
        view: The visit's slot of the cache, or None.

    Returns:
        Hidden states ``[B, T, D]``.
    """
    options = {
        "attention_mask": sides.masks[kind],
        "position_ids": sides.position_ids,
        "past_key_values": view,
        "use_cache": view is not None,
        "position_embeddings": sides.rotary[kind],
    }
    if kind != "linear_attention":
        # Positional: reentrant checkpointing only follows positional inputs.
        return layer(h, **options)
    if sides.documents is not None:
        return sides.documents.run(lambda rows: layer(rows, **options), h)
    if view is not None:
        options["cache_view"] = view
    if sides.active is None:
        return layer(h, **options)
    order = (~sides.active).long().argsort(dim=1, stable=True)
    compacted = h.gather(1, order[..., None].expand_as(h))
    out = layer(compacted, **{**options, "attention_mask": sides.masks[kind].gather(1, order)})
    return out.gather(1, order.argsort(dim=1)[..., None].expand_as(out))
