"""What the layers of one call share: attention masks, rotary embeddings, positions and packed documents.

All of it is computed once per call. Recurrent layers need two things that attention gets from its mask:

* Packed documents (`position_ids` that restart): each document becomes a row of its own for the layer, so neither the
  convolution nor the state crosses a boundary.
* Padding after a token in a cached call (right padding): it must not enter the states that the next call continues from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from mull.layers.routers import sequence_numbers
from mull.model.configs import layer_kinds
from mull.model.fixed_cache import StaticCall
from mull.model.growing_cache import SlotCache
from mull.model.memory import ActiveTokens
from mull.runtime.arguments import require, require_ids, require_shape, require_tensors

MASKED_ATTENTION = ("sdpa", "eager")
"""Implementations of attention that obey any mask, one row of queries at a time."""

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords of ``forward`` that describe packed documents, as collators of transformers give them."""

WITHOUT_EFFECT = ("token_type_ids", "mm_token_type_ids", "cache_position", "tokenizer")
"""Keywords of ``forward`` that tokenizers, ``generate`` and other versions of transformers give, and its text models ignore."""

RotaryOfCall = Callable[[set[str], Tensor, Tensor], dict[str, Any]]
"""``(kinds of layers, hidden states, position_ids) -> position embeddings by kind``."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed batch are. S documents, L tokens in the longest."""

    index: Tensor
    """``[S, L]``: flat position ``row * T + column`` of each token; 0 after the end of a document."""

    inverse: Tensor
    """``[B * T]``: flat position in ``[S, L]`` of each token of the batch."""

    borders: Tensor
    """``[S + 1]``, int32: flat position in the batch where each document begins, and B * T."""

    @property
    def number(self) -> Tensor:
        """``[1, B * T]``, int32: the document of each token of the batch."""
        return (self.inverse // self.index.shape[1]).int()[None]

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[S, L, ...]``: each document a row of its own. Entries after its end are meaningless."""
        return x.flatten(0, 1)[self.index]

    def join(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo `split`."""
        return rows.flatten(0, 1)[self.inverse].view_as(like)


def packed_positions(
    keywords: Mapping[str, Any],
    shape: Sequence[int],
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """`position_ids` ``[B, T]`` that restart where the keywords `PACKING` say that a document begins.

    Args:
        keywords: Of these, ``cu_seq_lens_q`` ``[S + 1]`` are the borders of the documents of a single row, and ``seq_idx``
            ``[B, T]`` is the number of each token's document. The other ones follow from them.
        shape: B and T.
        attention_mask: Has to be None where documents are packed.
        position_ids: Positions, if they were given too.

    Returns:
        `position_ids` as they were without such keywords.

    Raises:
        TypeError: a keyword of another type.
        ValueError: the arguments contradict each other, or do not fit the tokens.
    """
    borders: Any = keywords.get("cu_seq_lens_q")
    numbers: Any = keywords.get("seq_idx")
    if borders is None and numbers is None:
        return position_ids
    if attention_mask is not None:
        raise ValueError(
            "Packed documents (cu_seq_lens_q, seq_idx) and an attention_mask contradict each other: leave the mask out."
        )
    if numbers is not None:
        require_ids("seq_idx", numbers)
        require_shape("seq_idx", numbers, shape)
        column = torch.arange(shape[1], device=numbers.device).expand(*shape)
        begins = F.pad(numbers.diff(dim=1) != 0, (1, 0), value=True)
    else:
        _check_borders(borders, shape)
        column = torch.arange(shape[1], device=borders.device).expand(*shape)
        begins = torch.isin(column, borders)
    positions = column - torch.where(begins, column, 0).cummax(1).values
    if position_ids is None:
        return positions
    if not torch.compiler.is_compiling() and not torch.equal(
        F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(*shape), begins
    ):
        raise ValueError("position_ids restart at other tokens than cu_seq_lens_q or seq_idx say.")
    return position_ids


def _check_borders(borders: Any, shape: Sequence[int]) -> None:
    require("cu_seq_lens_q", borders, Tensor, "a tensor [documents + 1] of borders")
    if shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q describes a batch of one row, and there are {shape[0]}.")
    if torch.compiler.is_compiling():
        return
    places = borders.tolist() if borders.ndim == 1 else []
    if not places or places[0] != 0 or places[-1] != shape[1] or places != sorted(places):
        raise ValueError(
            f"cu_seq_lens_q has to rise from 0 to {shape[1]}, the number of tokens, and is {borders.tolist()}."
        )


def check_call(
    config: PreTrainedConfig,
    shape: Sequence[int],
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    use_cache: bool | None,
) -> None:
    """Refuse arguments of ``forward`` that do not fit B rows of T tokens. Masks are checked further in `layer_inputs`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a tensor of another shape, or a mask that is missing.
    """
    n_rows, n_tokens = shape
    if use_cache is not None:
        require("use_cache", use_cache, bool, "True or False, or leave it out")
    if position_ids is not None:
        require_ids("position_ids", position_ids)
        require_shape("position_ids", position_ids, (n_rows, n_tokens), (1, n_tokens))
    if not isinstance(attention_mask, dict):
        require_tensors(attention_mask=attention_mask)
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[0] != n_rows:
            raise ValueError(f"attention_mask has {attention_mask.shape[0]} rows, and there are {n_rows}.")
        return
    # transformers' masks by kind of layer
    if missing := sorted({kind for kind in layer_kinds(config) if kind != "linear_attention"} - attention_mask.keys()):
        raise ValueError(f"attention_mask has no mask for layers of the kind {missing[0]}.")
    for kind, mask in attention_mask.items():
        require(f"attention_mask[{kind!r}]", mask, (Tensor, BlockMask, NoneType), "a mask of transformers, or None")


def check_embeddings(embeddings: Any, width: int) -> None:
    """Refuse ``inputs_embeds`` that are no states of this width.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor of another shape, or of whole numbers.
    """
    require("inputs_embeds", embeddings, Tensor, "a tensor [rows, tokens, width]")
    if embeddings.ndim != 3 or embeddings.shape[-1] != width or 0 in embeddings.shape:
        raise ValueError(f"inputs_embeds has shape {tuple(embeddings.shape)}; give [rows, tokens, {width}].")
    if not embeddings.is_floating_point():
        raise ValueError(f"inputs_embeds has the type {embeddings.dtype}: give token numbers as input_ids.")


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuse keywords of ``forward`` that it would have to ignore.

    Raises:
        TypeError: one is neither in `PACKING` nor in `WITHOUT_EFFECT`.
    """
    for name in keywords:
        if name not in (*PACKING, *WITHOUT_EFFECT):
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def new_tokens(attention_mask: Tensor | dict[str, Any] | None, h: Tensor) -> Tensor | None:
    """``[B, T]``, False where the tokens of states `h` ``[B, T, D]`` are padding; None if no mask says so."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -h.shape[1] :] == 1


def is_packed(position_ids: Tensor) -> bool:
    """Whether `position_ids` ``[B, T]`` restart inside a row. Always False while compiling, where values cannot be read."""
    if torch.compiler.is_compiling() or position_ids.shape[1] == 1:
        return False
    return bool((position_ids.diff(dim=1) != 1).any())


def use_of_cache(position_ids: Tensor, cached: bool, use_cache: bool | None) -> bool | None:
    """`use_cache` of a call without a mask: False where `position_ids` ``[B, T]`` restart.

    Raises:
        ValueError: they restart, and a cache is given or asked for.
    """
    if not is_packed(position_ids):
        return use_cache
    # transformers' masks would let documents see each other, silently.
    if cached or use_cache:
        raise ValueError(
            "position_ids restart, so the rows hold several packed documents, and these cannot continue from a cache. "
            "Pass use_cache=False, or one document per row."
        )
    return False


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
    borders = torch.cat([start, length.sum()[None]]).int()
    return Documents(index, number * index.shape[1] + offset, borders)


@dataclass(frozen=True)
class LayerInputs:
    """Everything besides hidden states and memory that the layers of one call need."""

    attention: str
    """The backbone's implementation of attention."""

    masks: dict[str, Any]
    """Attention mask by kind of layer, in the form that the implementation takes; None is plain causality."""

    rotary: dict[str, Any]
    """Position embeddings by kind of layer."""

    position_ids: Tensor
    """``[B or 1, T]``."""

    documents: Documents | None = None
    """Packed documents, for recurrent layers."""

    in_states: Tensor | None = None
    """``[B, T]``, False for padding after a token, which must not enter recurrent states; None where there is none."""

    def recurrent_tokens(self, active: ActiveTokens | None) -> ActiveTokens | None:
        """The tokens whose sequence a recurrent layer runs: active ones that are no padding. None if that is all of them."""
        padding = self.masks["linear_attention"]
        if active is not None:
            return active if padding is None else ActiveTokens.of(active.mask & (padding == 1))
        return None if self.in_states is None else ActiveTokens.reordered(self.in_states)

    def sequences(self, n_rows: int) -> Tensor:
        """``[B, T]``: number of each token's sequence. One begins with a token that sees no other of the call before it."""
        n_tokens = self.position_ids.shape[1]
        mask = next((x for x in self.masks.values() if isinstance(x, Tensor) and x.ndim == 4), None)
        if mask is None:  # plain causality, or an attention that finds packed documents by their positions
            begins = F.pad(self.position_ids.diff(dim=1) != 1, (1, 0), value=True)
        else:
            # A bias is finite; what no token may see has the least value of the type, or infinity.
            visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            begins = ~visible.any(1)[..., -n_tokens:].tril(-1).any(-1)  # the call's own keys come last
        return sequence_numbers(begins.expand(n_rows, n_tokens))

    def require_masks(self) -> None:
        """Refuse an attention that cannot run a part of the tokens.

        Raises:
            ValueError: the backbone's cannot.
        """
        if self.attention not in MASKED_ATTENTION:
            raise ValueError(
                f"attn_implementation={self.attention!r} cannot run a part of the tokens. Load the model with "
                f"attn_implementation={' or '.join(map(repr, MASKED_ATTENTION))}."
            )


class PartialInputs:
    """What attention layers of one call share, for the tokens that run. Each part is gathered once for all layers that need it.

    Args:
        inputs: For all tokens.
        active: The tokens that run.
    """

    def __init__(self, inputs: LayerInputs, active: ActiveTokens) -> None:
        self.active = active
        self.position_ids = active.gather(inputs.position_ids)
        """``[R, A]``."""
        self._inputs = inputs
        self._rotary: dict[str, Any] = {}
        self._visible: dict[tuple[str, int], Tensor] = {}

    def rotary(self, kind: str) -> Any:
        """Position embeddings of layers of a kind."""
        embeddings = self._inputs.rotary[kind]
        if embeddings is not None and kind not in self._rotary:
            self._rotary[kind] = tuple(self.active.gather(part) for part in embeddings)
        return self._rotary.get(kind)

    def mask(self, kind: str, n_keys: int, known: Tensor | None) -> Tensor:
        """Attention mask, in the form that the implementation takes.

        Args:
            kind: Kind of the layer.
            n_keys: Keys that attention looks at.
            known: ``[B, n_keys]``, False for keys that are no token's; None if all are.

        Returns:
            ``[R, 1, A, n_keys]``.
        """
        of_all = self._inputs.masks[kind]
        if (kind, n_keys) not in self._visible:
            self._visible[kind, n_keys] = self._gathered(of_all, n_keys)
        visible = self._visible[kind, n_keys]
        if known is not None:
            visible = self._filled_up(visible & self.active.of_rows(known)[:, None, None])
        return visible if of_all is None or of_all.dtype == torch.bool else additive(visible, of_all.dtype)

    def _filled_up(self, visible: Tensor) -> Tensor:
        """What fills up a row is not kept, but a query that sees no key at all has no gradient."""
        return visible | ~self.active.filled[:, None, :, None]

    def _gathered(self, mask: Tensor | None, n_keys: int) -> Tensor:
        n_tokens = self.active.mask.shape[1]
        if mask is None:
            mask = torch.ones(1, 1, n_tokens, n_keys, dtype=torch.bool, device=self.active.mask.device)
            mask = mask.tril(n_keys - n_tokens)
        visible = mask if mask.dtype == torch.bool else mask == 0
        return self._filled_up(self.active.gather(visible.transpose(1, 2)).transpose(1, 2))


def layer_inputs(
    config: PreTrainedConfig,
    rotary: RotaryOfCall,
    h: Tensor,
    attention_mask: Tensor | dict[str, Any] | None = None,
    position_ids: Tensor | None = None,
    cache: SlotCache | None = None,
) -> LayerInputs:
    """Layer inputs of a call without a cache, or on a growing one.

    Args:
        config: Configuration of the backbone.
        rotary: Its position embeddings.
        h: Embeddings ``[B, T, D]``.
        attention_mask: ``[B, past + T]`` with 0 at padding, ``[B, 1, T, past + T]`` boolean, or masks by kind of layer.
        position_ids: ``[B, T]``; None counts from the tokens in the cache. Without mask and cache, a restart begins a document.
        cache: Cache whose slots are already bound, or None.

    Raises:
        ValueError: a mask of a shape that the backbone cannot obey.
    """
    kinds = set(layer_kinds(config))
    past = 0 if cache is None else cache.n_tokens
    if isinstance(attention_mask, Tensor):
        attention_mask = _checked_mask(attention_mask, h, past, config, "linear_attention" in kinds)
    elif isinstance(attention_mask, dict):
        attention_mask = {"linear_attention": None, **attention_mask}
    may_be_packed = position_ids is not None and attention_mask is None and cache is None
    if position_ids is None:
        position_ids = (torch.arange(h.shape[1], device=h.device) + past)[None]
    masks: Any = attention_mask
    if not isinstance(attention_mask, dict):
        masks = create_masks_for_generate(config, h, attention_mask, cache, position_ids)
    if not isinstance(masks, dict):
        masks = dict.fromkeys(kinds, masks)
    attention = str(config._attn_implementation)
    embeddings = rotary(kinds, h, position_ids)
    if "linear_attention" not in kinds or isinstance(attention_mask, dict):
        return LayerInputs(attention, masks, embeddings, position_ids)
    padding, in_states = _recurrent_padding(attention_mask, h.shape[1], cache is not None)
    documents = find_documents(position_ids, h.shape[0]) if may_be_packed else None
    masks = {**masks, "linear_attention": padding}
    return LayerInputs(attention, masks, embeddings, position_ids, documents, in_states)


def fixed_layer_inputs(config: PreTrainedConfig, rotary: RotaryOfCall, h: Tensor, call: StaticCall) -> LayerInputs:
    """Layer inputs of a call on a cache of fixed size. Nothing here waits for the device, so it can be compiled or captured.

    Args:
        config: Configuration of the backbone.
        rotary: Its position embeddings.
        h: Embeddings ``[B, T, D]``.
        call: Where the tokens are in the cache.

    Raises:
        ValueError: the backbone uses an attention that is neither sdpa nor eager.
    """
    attention = str(config._attn_implementation)
    if attention not in MASKED_ATTENTION:
        raise ValueError(
            f"Attention {attention!r} cannot look into a cache of fixed size. Load the model with attn_implementation='sdpa' "
            "(or 'eager')."
        )
    kinds = set(layer_kinds(config))
    reach = h.shape[1] if call.fresh else call.n_keys
    key = torch.arange(reach, device=h.device)
    position = call.positions[:, None, :, None]
    masks: dict[str, Tensor | None] = dict.fromkeys(kinds)
    for kind in kinds - {"linear_attention"}:
        window = config.sliding_window if kind == "sliding_attention" else None
        if (call.fresh or call.sees_all) and attention == "sdpa" and (window is None or reach <= window):
            continue  # without a mask, sdpa is causal by itself, and a single token sees all
        visible = key <= position  # (B, 1, T, keys)
        if window is not None:
            visible = visible & (key > position - window)
        masks[kind] = visible if attention == "sdpa" else additive(visible, h.dtype)
    return LayerInputs(attention, masks, rotary(kinds, h, call.positions), call.positions)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that eager attention adds to its scores, from one that is True where a query sees a key."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _checked_mask(mask: Tensor, h: Tensor, past: int, config: PreTrainedConfig, recurrent: bool) -> Tensor:
    """The mask, one of 4 dimensions in the form that the backbone's attention takes."""
    n_new, n_keys = h.shape[1], past + h.shape[1]
    if mask.ndim == 2 and mask.shape[1] != n_keys:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {n_keys}: it has to cover those in the cache and the "
            "new ones."
        )
    if mask.ndim == 2:
        return mask
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; use [batch, tokens] or [batch, 1, queries, keys]."
        )
    if recurrent:
        raise ValueError(
            "Recurrent layers cannot obey a 4-dimensional attention_mask. Use a [batch, tokens] mask for padding, and "
            "position_ids that restart for packed documents."
        )
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} cannot obey a 4-dimensional attention_mask. Use 'sdpa' or "
            "'eager'."
        )
    heads = (1, config.num_attention_heads)
    require_shape("attention_mask", mask, *((b, n, n_new, n_keys) for b in (h.shape[0], 1) for n in heads))
    if mask.dtype == torch.bool:
        return mask if config._attn_implementation == "sdpa" else additive(mask, h.dtype)
    # Ones and zeros would be added to the scores, where they hide nothing.
    if not mask.is_floating_point() or (not torch.compiler.is_compiling() and bool((mask > 0).any())):
        raise ValueError(
            f"A 4-dimensional attention_mask of {mask.dtype} is added to the scores, so it must hold 0 where a query sees a key "
            "and a large negative number elsewhere. Where it holds ones and zeros, give attention_mask.bool()."
        )
    return mask.to(h.dtype)


def _recurrent_padding(mask: Tensor | None, n_new: int, cached: bool) -> tuple[Tensor | None, Tensor | None]:
    """Padding mask of the new tokens for recurrent layers, and `LayerInputs.in_states`."""
    if mask is None:
        return None, None
    new = mask[:, -n_new:].contiguous()
    if not torch.compiler.is_compiling() and bool((new == 1).all()):
        return None, None
    padded_later = ((new == 0) & (mask.cumsum(1)[:, -n_new:] > 0)).any(1, keepdim=True)
    # While tracing, values cannot be read.
    if cached and (torch.compiler.is_compiling() or bool(padded_later.any())):
        return new, (new == 1) | ~padded_later
    return new, None


def check_padding_side(mask: Tensor | None, n_new: int, config: PreTrainedConfig) -> None:
    """Refuse tokens that follow right padding where sliding windows count tokens by their place in the cache.

    Raises:
        ValueError: the model has sliding-window layers and a row continues after padding.
    """
    if mask is None or mask.ndim != 2 or mask.shape[1] == n_new or "sliding_attention" not in layer_kinds(config):
        return
    if mask.shape[1] <= config.sliding_window:
        return
    gap = (mask == 0) & (mask.cumsum(1) > 0)
    if bool((gap[:, :-n_new].any(1) & (mask[:, -n_new:] == 1).any(1)).any()):
        raise ValueError(
            "A row continues after right padding, but the sliding windows of this model count tokens by their place in the "
            "cache, padding included. Pad on the left."
        )
