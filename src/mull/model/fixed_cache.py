"""A cache of fixed size for decoding: rows advance by different numbers of tokens, and rejected tokens leave no trace.

`mull.model.growing_cache` grows with every call and moves all rows together. This one is allocated once, every buffer keeps its
address (compiled code and captured graphs rely on it), and the caller says for each row where its tokens are.

A token's slot is its position in its row's own text, so rows are left-aligned and padding never enters. A query at position p
sees the keys at positions 0..p. Later ones are invisible, and overwritten when the row gets there. Taking tokens back therefore
means counting fewer of them, also for sliding layers, whose buffers have full length as well. Recurrent layers cannot forget
that way: after a call whose tokens are still to be judged, `StaticSlotCache.commit` advances their states over those that stay.

Shapes: B batch, T tokens of a call, A tokens that run in the row with most of them, H heads, W width of a head, C channels of a
convolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from mull.model.configs import Stop
from mull.model.memory import ActiveTokens, Decision, LayerKeys, Merge, head_width
from mull.model.path import Path, Visit
from mull.ops.gated_delta import DeltaWrites, convolution_window, no_op_where_inactive, short_gated_delta, written_state

LONGEST_SHORT_CALL = 16
"""Calls of up to this many tokens run `short_gated_delta`; longer ones transformers' chunked rule."""


@dataclass(frozen=True)
class StaticCall:
    """Where the tokens of one call are in the cache."""

    positions: Tensor
    """``[B, T]`` int64: slot in the cache, and rotary position, of each token. They increase by 1 within a row."""

    n_keys: int
    """Attention looks at slots 0 to ``n_keys - 1``; more than every position, at most the capacity. Compiled code passes the
    capacity."""

    n_valid: Tensor | None
    """``[B]`` int64: tokens of the row that count, from its left end. Recurrent states advance over them at once. None if that is
    not known yet; the caller then owes a `StaticSlotCache.commit`."""

    fresh: bool = False
    """All rows start with this call, at position 0: attention is causal over the call's own tokens and reads no cache."""

    sees_all: bool = False
    """The call is one row with one token, at slot ``n_keys - 1``. It sees every key, so attention needs no mask."""


class AttentionSlot:
    """Keys and values of one visit, ``[B, H, capacity, W]`` each."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.key = _fixed(torch.zeros(shape, dtype=dtype, device=device))
        self.value = _fixed(torch.zeros(shape, dtype=dtype, device=device))
        self._rows = _fixed(torch.arange(shape[0], device=device)[:, None])
        self.known: Tensor | None = None
        """``[B, capacity]``, False where no query may look; None until a call runs a part of its tokens."""

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return self.key, self.value

    def forget(self) -> None:
        """Forget which tokens offered nothing."""
        if self.known is not None:
            self.known.fill_(True)

    def keep_known(self) -> None:
        """Have `known` from the beginning, for compiled calls that run a part of their tokens."""
        shape = self.key.shape[0], self.key.shape[2]
        self.known = _fixed(torch.ones(shape, dtype=torch.bool, device=self.key.device))

    def mark_known(self, call: StaticCall, known: Tensor | None) -> None:
        """Say which of a call's tokens, ``[B, T]``, offer keys; None for all."""
        if known is None and self.known is None:
            return
        if known is None:
            known = torch.ones_like(call.positions, dtype=torch.bool)
        if self.known is None:
            self.keep_known()
            assert self.known is not None
        self.known[self._rows, call.positions] = known

    def read(self, call: StaticCall) -> LayerKeys:
        """What a call's tokens offer here."""
        known = None if self.known is None else self.known[self._rows, call.positions]
        key, value = (
            buffer.transpose(1, 2)[self._rows, call.positions].transpose(1, 2) for buffer in (self.key, self.value)
        )
        return LayerKeys(key, value, known)

    def see(self, call: StaticCall) -> tuple[Tensor, Tensor]:
        """The keys and values that attention of a call looks at, once its own are written."""
        n_keys = call.positions.shape[1] if call.fresh else call.n_keys
        return self.key[:, :, :n_keys], self.value[:, :, :n_keys]

    def update(self, call: StaticCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values, ``[B, H, T, W]``, and return those that attention looks at."""
        assert key.shape[1::2] == self.key.shape[1::2], f"{key.shape} does not fit into {self.key.shape}"
        if call.fresh:
            self.key[:, :, : key.shape[2]] = key
            self.value[:, :, : key.shape[2]] = value
            return key, value
        self.key.transpose(1, 2)[self._rows, call.positions] = key.transpose(1, 2)
        self.value.transpose(1, 2)[self._rows, call.positions] = value.transpose(1, 2)
        return self.see(call)


class SharedSlot(AttentionSlot):
    """A later visit of a layer whose visits share the keys and values of each token's first. Its own is only who has some."""

    def __init__(self, before: AttentionSlot) -> None:
        self.key, self.value, self._rows = before.key, before.value, before._rows
        self.known = None
        self._before = before

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """None of its own."""
        return ()

    @property
    def complete(self) -> bool:
        """Whether all tokens have keys and values from earlier visits."""
        return self._before.known is None

    def update(self, call: StaticCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values, unless nothing in them is new, and return those that attention looks at."""
        return self.see(call) if self.complete else super().update(call, key, value)


class RecurrentState:
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
        self.passed_over = False
        """No token of the call that waits ran the layer, so there is nothing to keep."""
        self._active: Tensor | None = None
        """``[B, T]``: the tokens of the last call that ran the layer; None for all."""

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Window and state."""
        return self.window, self.state

    def convolve(self, call: StaticCall, inputs: Tensor, active: Tensor | None) -> Tensor:
        """Append a call's inputs ``[B, C, A]``, of the tokens `active` ``[B, T]``; return what the layer convolves."""
        assert self.undecided_inputs is None, "a call waits for its commit"
        full = torch.cat([self.window, inputs], dim=-1)
        self._active, self.passed_over = active, False
        if call.n_valid is None:
            self.undecided_inputs = full
        else:
            self.window.copy_(convolution_window(full, self.window.shape[-1], self._n_ran(call.n_valid)))
        return inputs if call.fresh else full

    def delta_rule(
        self, call: StaticCall, rule: Any, inputs: tuple[Tensor, Tensor, Tensor], g: Tensor, beta: Tensor, **kwargs: Any
    ) -> Tensor:
        """Outputs ``[B, A, H, V]`` for `inputs`, which are queries, keys and values."""
        if call.n_valid is not None:
            ran = torch.arange(g.shape[1], device=g.device) < self._n_ran(call.n_valid)[:, None]
            g, beta = no_op_where_inactive(g, beta, ran)
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

    def forget(self) -> None:
        """Forget the call that waits."""
        self.passed_over = False
        self.undecided_inputs = self.undecided_writes = self._active = None

    def _n_ran(self, n_tokens: Tensor) -> Tensor:
        """``[B]``: how many of the first `n_tokens` ``[B]`` of the last call ran the layer."""
        if self._active is None:
            return n_tokens
        first = torch.arange(self._active.shape[1], device=n_tokens.device) < n_tokens[:, None]
        return (self._active & first).sum(1)

    def commit(self, n_keep: Tensor) -> None:
        """Keep the first tokens ``[B]`` of the call that waits."""
        if self.passed_over:
            self.passed_over = False
            return
        assert self.undecided_inputs is not None, "no call waits for a commit"
        assert self.undecided_writes is not None, "no call waits for a commit"
        n_ran = self._n_ran(n_keep)
        self.window.copy_(convolution_window(self.undecided_inputs, self.window.shape[-1], n_ran))
        self.state.copy_(written_state(self.state, self.undecided_writes, n_ran))
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
        shares: Whether all visits of an attention layer have the slot of its first, see ``share_first`` in `Stop`.
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
        shares: bool = False,
    ) -> None:
        kinds, _ = get_layer_types_and_kwargs(text_config)
        self.path = path
        """The visits that own the slots."""
        self.capacity = capacity

        def new_slot(kind: str) -> AttentionSlot | RecurrentState:
            if kind == "linear_attention":
                return RecurrentState(*_recurrent_shapes(text_config, batch_size), dtype, device)
            keys = (batch_size, text_config.num_key_value_heads, capacity, head_width(text_config))
            return AttentionSlot(keys, dtype, device)

        self.slots: list[AttentionSlot | RecurrentState] = []
        latest: dict[int, int] = {}
        self.earlier: list[int | None] = []
        """For each visit, the number of the one before it of the same layer; None if it is the first."""
        for number, visit in enumerate(path):
            earlier = latest.get(visit.layer)
            before = None if earlier is None else self.slots[earlier]
            shared = shares and isinstance(before, AttentionSlot)
            self.slots.append(SharedSlot(before) if shared else new_slot(kinds[visit.layer]))  # type: ignore[arg-type]
            self.earlier.append(earlier)
            latest[visit.layer] = number
        self._head_slots = [new_slot("full_attention") for _ in range(n_head_blocks)]
        self.decisions: dict[Decision, Tensor] = {}
        """``[B]``: what was decided about a row when it was read."""

    def head_slot(self, block: int, call: StaticCall) -> "FixedSlot":
        """The memory of block number `block` of the heads, which has full attention."""
        assert call.n_keys <= self.capacity, f"{call.n_keys} keys do not fit into {self.capacity} slots"
        return FixedSlot(self._head_slots[block], call)

    def commit(self, n_keep: Tensor, visits: slice = slice(None)) -> None:
        """After a call with ``n_valid=None``, keep its first `n_keep` tokens, ``[B]`` int64, in recurrent states of `visits`."""
        for slot in self.slots[visits]:
            if isinstance(slot, RecurrentState):
                slot.commit(n_keep)

    def prepare_stops(self, stop: Stop) -> None:
        """Have the buffers that compiled calls need if tokens may stop."""
        for slot, earlier in zip(self.slots, self.earlier, strict=True):
            if stop == "active_only" and earlier is not None and isinstance(slot, AttentionSlot):
                slot.keep_known()

    def reset(self) -> None:
        """Forget every token, in place."""
        self.decisions.clear()
        for slot in (*self.slots, *self._head_slots):
            for buffer in slot.buffers:
                buffer.zero_()
            slot.forget()

    def recurrent_buffers(self) -> list[Tensor]:
        """What `commit` changes: all else is overwritten before it can be seen again."""
        return [buffer for slot in self.slots if isinstance(slot, RecurrentState) for buffer in slot.buffers]

    @property
    def n_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for slot in (*self.slots, *self._head_slots) for buffer in slot.buffers)


def _recurrent_shapes(config: PreTrainedConfig, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    state = (batch_size, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    _, n_heads, key_width, value_width = state
    # Queries and keys have the same heads; the convolution runs over both, and over the values.
    n_channels = 2 * config.linear_num_key_heads * key_width + n_heads * value_width
    return (batch_size, n_channels, config.linear_conv_kernel_dim), state


class FixedMemory:
    """The `Memory` of one call on a cache of fixed size."""

    def __init__(self, cache: StaticSlotCache, call: StaticCall, stop: Stop | None = None) -> None:
        assert call.n_keys <= cache.capacity, f"{call.n_keys} keys do not fit into {cache.capacity} slots"
        self._cache = cache
        self._call = call
        self._stop = stop

    def has_gaps(self, number: int) -> bool:
        """See `Memory`, also for the methods below."""
        slot = self._cache.slots[number]
        return isinstance(slot, AttentionSlot) and slot.known is not None

    def slot(self, number: int, visit: Visit, active: ActiveTokens | None, own: LayerKeys | None = None) -> "FixedSlot":
        """The slot of a visit."""
        slot = self._cache.slots[number]
        merge, shared = None, isinstance(slot, SharedSlot)
        if isinstance(slot, SharedSlot) and slot.complete:
            return FixedSlot(slot, self._call, active)
        if isinstance(slot, AttentionSlot) and (active is not None or shared):
            merge = Merge(active, self._idle(number, own), shared)
            slot.mark_known(self._call, merge.known)
        return FixedSlot(slot, self._call, active, merge)

    def _idle(self, number: int, own: LayerKeys | None) -> LayerKeys | None:
        """What tokens offer in a visit that they do not run."""
        earlier = self._cache.earlier[number]
        shared = isinstance(self._cache.slots[number], SharedSlot)
        if earlier is None or (self._stop != "last_kv" and not shared):
            return own
        slot = self._cache.slots[earlier]
        assert isinstance(slot, AttentionSlot), "a layer is of one kind"
        return slot.read(self._call)

    def pass_over(self, number: int, visit: Visit, h: Tensor, own: LayerKeys | None = None) -> None:
        """The tokens offer what their kind of stopping says, or nothing."""
        slot = self._cache.slots[number]
        if isinstance(slot, RecurrentState):
            slot.passed_over = self._call.n_valid is None
            return
        if isinstance(slot, SharedSlot) and slot.complete:
            return
        keys = self._idle(number, own)
        if keys is None:
            slot.mark_known(self._call, torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device))
            return
        slot.mark_known(self._call, keys.known)
        slot.update(self._call, keys.key, keys.value)


class FixedSlot:
    """The `LayerMemory` of one visit, or of a head's block, during one call on a cache of fixed size."""

    def __init__(
        self,
        slot: "AttentionSlot | RecurrentState",
        call: StaticCall,
        active: ActiveTokens | None = None,
        merge: Merge | None = None,
    ) -> None:
        # Which of the two it is follows from the layer: each calls only the methods of its kind.
        self._slot: Any = slot
        self._call = call
        self._active = active
        self._merge = merge

    @property
    def n_keys(self) -> int:
        """See `LayerMemory`, also for the methods below."""
        return self._call.positions.shape[1] if self._call.fresh else self._call.n_keys

    @property
    def known(self) -> Tensor | None:
        """By position; in a fresh call, by token of the call."""
        if self._merge is None:
            return None
        if self._call.fresh or self._slot.known is None:
            return self._merge.known if self._call.fresh else None
        return self._slot.known[:, : self._call.n_keys]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values at the positions of their tokens, and return those that attention looks at."""
        keys = LayerKeys(key_states, value_states)
        keys = keys if self._merge is None else self._merge(key_states, value_states)
        key, value = self._slot.update(self._call, keys.key, keys.value)
        return (key, value) if self._active is None else (self._active.of_rows(key), self._active.of_rows(value))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The window before the call."""
        return self._slot.window

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The state before the call."""
        return self._slot.state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Append a call's inputs to the window, or keep them until the commit."""
        if self._active is None:
            return self._slot.convolve(self._call, conv_states, None)
        inputs = self._active.to_all_rows(conv_states)
        return self._active.of_rows(self._slot.convolve(self._call, inputs, self._active.mask))

    def update_recurrent_state(
        self, recurrent_states: Tensor | None, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Return the state: `delta_rule` has stored it already."""
        return self._slot.state

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: the layer hands every token to the memory."""
        return True

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the rule and advance the state, or keep what it would write until the commit."""
        if self._active is None:
            return self._slot.delta_rule(self._call, rule, (query, key, value), g, beta, **kwargs), self._slot.state
        query, key, value, g, beta = map(self._active.to_all_rows, (query, key, value, g, beta))
        out = self._slot.delta_rule(self._call, rule, (query, key, value), g, beta, **kwargs)
        return self._active.of_rows(out), self._slot.state
