"""A cache of fixed size for decoding: rows advance by different numbers of tokens, and rejected tokens leave no trace.

`mull.model.growing_cache` grows with every call and moves all rows together; this one is allocated once, every buffer keeps
its address
(compiled code and captured graphs rely on it), and the caller says for each row where its tokens stand.

A token's slot is its position in its row's own text, so rows are left-aligned and padding never enters. A query at position p
sees the keys at positions 0..p: whatever stands behind it is invisible, and overwritten when the row gets there. Taking tokens
back is therefore nothing but counting fewer of them, also for sliding layers, whose buffers have full length as well. Only
recurrent layers cannot forget that way: after a call whose tokens are still to be judged, `StaticSlotCache.commit` advances
their states over those that stay.

Shapes: B batch, T tokens of a call, H heads, W width of a head, C channels of a convolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from mull.model.path import Path
from mull.ops.gated_delta import (
    DeltaWrites,
    convolution_window,
    no_op_where_inactive,
    short_gated_delta,
    written_state,
)

LONGEST_SHORT_CALL = 16
"""Calls of up to this many tokens run `short_gated_delta`; longer ones transformers' chunked rule."""


@dataclass(frozen=True)
class StaticCall:
    """Where the tokens of one call stand."""

    positions: Tensor
    """``[B, T]`` int64: slot in the cache, and rotary position, of each token. They increase by 1 within a row."""

    n_keys: int
    """Attention looks at slots 0 to ``n_keys - 1``; more than every position, at most the capacity. Compiled code passes the
    capacity."""

    n_valid: Tensor | None
    """``[B]`` int64: tokens of the row that count, from its left end. Recurrent states advance over them at once. None if that is
    not known yet; the caller then owes a `StaticSlotCache.commit`."""

    fresh: bool = False
    """The rows start here, each at position 0: attention is causal over the call's own tokens, without a look into the cache."""

    sees_all: bool = False
    """There is one row with one token, at slot ``n_keys - 1``: it sees every key, so attention needs no mask."""


class _AttentionSlot:
    """Keys and values of one visit, ``[B, H, capacity, W]`` each."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.key = _fixed(torch.zeros(shape, dtype=dtype, device=device))
        self.value = _fixed(torch.zeros(shape, dtype=dtype, device=device))
        self._rows = _fixed(torch.arange(shape[0], device=device)[:, None])

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    def update(self, call: StaticCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values, ``[B, H, T, W]``, and return those that attention looks at."""
        assert key.shape[1::2] == self.key.shape[1::2], f"{key.shape} does not fit into {self.key.shape}"
        if call.fresh:
            self.key[:, :, : key.shape[2]] = key
            self.value[:, :, : key.shape[2]] = value
            return key, value
        self.key.transpose(1, 2)[self._rows, call.positions] = key.transpose(1, 2)
        self.value.transpose(1, 2)[self._rows, call.positions] = value.transpose(1, 2)
        return self.key[:, :, : call.n_keys], self.value[:, :, : call.n_keys]


class _RecurrentSlot:
    """Convolution window ``[B, C, kernel]`` and delta-rule state ``[B, H, K, V]`` of one visit. Zeros are no past."""

    def __init__(
        self, window: tuple[int, ...], state: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.window = _fixed(torch.zeros(window, dtype=dtype, device=device))
        precision = torch.promote_types(dtype, torch.float32)
        self.state = _fixed(torch.zeros(state, dtype=precision, device=device))
        self.undecided_inputs: Tensor | None = None
        """Inputs of the convolution, the window before them included, of a call that waits for its commit."""
        self.undecided_writes: DeltaWrites | None = None

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.window, self.state

    def convolve(self, call: StaticCall, inputs: Tensor) -> Tensor:
        """Take in a call's inputs ``[B, C, T]`` and return what the layer convolves."""
        assert self.undecided_inputs is None, "a call waits for its commit"
        full = torch.cat([self.window, inputs], dim=-1)
        if call.n_valid is None:
            self.undecided_inputs = full
        else:
            self.window.copy_(convolution_window(full, self.window.shape[-1], call.n_valid))
        return inputs if call.fresh else full

    def delta_rule(
        self, call: StaticCall, rule: Any, inputs: tuple[Tensor, Tensor, Tensor], g: Tensor, beta: Tensor, **kwargs: Any
    ) -> Tensor:
        """Outputs ``[B, T, H, V]`` for `inputs`, which are queries, keys and values."""
        if call.n_valid is not None:
            active = torch.arange(g.shape[1], device=g.device) < call.n_valid[:, None]
            g, beta = no_op_where_inactive(g, beta, active)
            if g.shape[1] > LONGEST_SHORT_CALL:
                out, state = rule(*inputs, g=g, beta=beta, **kwargs)
                self.state.copy_(state)
                return out
        out, writes = short_gated_delta(*inputs, g, beta, self.state)
        if call.n_valid is None:
            self.undecided_writes = writes
        else:
            self.state.copy_(written_state(self.state, writes))
        return out

    def commit(self, n_keep: Tensor) -> None:
        """Keep the first tokens ``[B]`` of the call that waits."""
        assert self.undecided_inputs is not None, "no call waits for a commit"
        assert self.undecided_writes is not None, "no call waits for a commit"
        self.window.copy_(convolution_window(self.undecided_inputs, self.window.shape[-1], n_keep))
        self.state.copy_(written_state(self.state, self.undecided_writes, n_keep))
        self.undecided_inputs = self.undecided_writes = None


def _fixed(buffer: Tensor) -> Tensor:
    """The same, and a promise to compiled code that it stays where it is."""
    torch._dynamo.mark_static_address(buffer)
    return buffer


class StaticSlotCache:
    """Keys, values and recurrent states of one path's visits, and of the blocks of multi-token-prediction heads.

    It takes no part in gradients: run its calls under ``torch.no_grad()``.

    Args:
        text_config: Configuration of the backbone.
        path: The visits; each owns a slot.
        batch_size: Rows.
        capacity: Positions that every row has room for, drafted tokens included.
        dtype: Precision of keys, values and convolution windows: the model's. Delta-rule states are held in fp32 at least.
        device: Where the buffers live.
        n_head_blocks: Decoder layers in the heads, each with a slot of its own.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        path: Path,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        n_head_blocks: int = 0,
    ) -> None:
        kinds, _ = get_layer_types_and_kwargs(text_config)
        self.path = path
        """The visits that own the slots."""
        self.capacity = capacity

        def new_slot(kind: str) -> _AttentionSlot | _RecurrentSlot:
            if kind == "linear_attention":
                return _RecurrentSlot(*_recurrent_shapes(text_config, batch_size), dtype, device)
            return _AttentionSlot(_attention_shape(text_config, batch_size, capacity), dtype, device)

        self._slots = [new_slot(kinds[visit.layer]) for visit in path]
        self._head_slots = [new_slot("full_attention") for _ in range(n_head_blocks)]

    def view(self, slot: int, call: StaticCall) -> "StaticSlotView":
        """What the layer of visit number `slot` sees as its cache."""
        assert call.n_keys <= self.capacity, f"{call.n_keys} keys do not fit into {self.capacity} slots"
        return StaticSlotView(self._slots[slot], call)

    def head_view(self, block: int, call: StaticCall) -> "StaticSlotView":
        """What block number `block` of the heads, with full attention, sees as its cache."""
        assert call.n_keys <= self.capacity, f"{call.n_keys} keys do not fit into {self.capacity} slots"
        return StaticSlotView(self._head_slots[block], call)

    def commit(self, n_keep: Tensor) -> None:
        """After a call with ``n_valid=None``, keep its first `n_keep` tokens, ``[B]`` int64, in every recurrent state."""
        for slot in self._slots:
            if isinstance(slot, _RecurrentSlot):
                slot.commit(n_keep)

    def reset(self) -> None:
        """Forget every token, in place."""
        for slot in (*self._slots, *self._head_slots):
            for buffer in slot.buffers:
                buffer.zero_()
            if isinstance(slot, _RecurrentSlot):
                slot.undecided_inputs = slot.undecided_writes = None

    def recurrent_buffers(self) -> list[Tensor]:
        """What `commit` changes: all else is overwritten before it can be seen again."""
        return [buffer for slot in self._slots if isinstance(slot, _RecurrentSlot) for buffer in slot.buffers]

    @property
    def n_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for slot in (*self._slots, *self._head_slots) for buffer in slot.buffers)


def _attention_shape(config: PreTrainedConfig, batch_size: int, capacity: int) -> tuple[int, ...]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return batch_size, config.num_key_value_heads, capacity, width


def _recurrent_shapes(config: PreTrainedConfig, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_heads, key_width, value_width = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    n_channels = 2 * config.linear_num_key_heads * key_width + n_heads * value_width
    window = (batch_size, n_channels, config.linear_conv_kernel_dim)
    return window, (batch_size, n_heads, key_width, value_width)


class StaticSlotView:
    """The cache as the layer of one visit sees it during one call: whatever `layer_idx` it passes, the visit's slot answers."""

    def __init__(self, slot: _AttentionSlot | _RecurrentSlot, call: StaticCall) -> None:
        self._slot = slot
        self._call = call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, each ``[B, H, T, W]``, and return those the layer may attend to."""
        assert isinstance(self._slot, _AttentionSlot)
        return self._slot.update(self._call, key_states, value_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Convolution window ``[B, C, kernel]``."""
        assert isinstance(self._slot, _RecurrentSlot)
        return self._slot.window

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Delta-rule state ``[B, H, K, V]`` before the call."""
        assert isinstance(self._slot, _RecurrentSlot)
        return self._slot.state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take in the convolution's inputs ``[B, C, T]`` and return what the layer convolves."""
        assert isinstance(self._slot, _RecurrentSlot)
        return self._slot.convolve(self._call, conv_states)

    def update_recurrent_state(
        self, recurrent_states: Tensor | None, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Return the state: `delta_rule` has stored it already."""
        return self.get_recurrent_state(layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: the layer takes its general path, which hands every token to the cache."""
        return True

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the delta rule over a call and advance the state, or remember how.

        Returns:
            Outputs ``[B, T, H, V]`` and the state that is held.
        """
        assert isinstance(self._slot, _RecurrentSlot)
        out = self._slot.delta_rule(self._call, rule, (query, key, value), g, beta, **kwargs)
        return out, self._slot.state
