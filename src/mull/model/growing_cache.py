"""A cache that grows with every call: one slot per visit, and everything in it moves together.

It is the cache of transformers' ``generate``. Length, positions and validity belong to the cache and not to a layer:
`SlotCache.n_tokens` counts tokens, whichever layers the path visits.

A path is bound to the cache by its first call and cannot change afterwards: a slot that missed tokens would silently attend to
a shorter past.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from mull.model.configs import Stop
from mull.model.memory import ActiveTokens, Decision, LayerKeys, Merge, OfferedKeys, head_width
from mull.model.path import Path, Visit
from mull.ops.gated_delta import convolution_window, no_op_where_inactive, replay_state


class _DeltaInputs(NamedTuple):
    """What one call fed to the convolution and the delta rule: A of its T tokens, and inactive ones after a row's active ones."""

    active: Tensor
    """``[B, T]`` in the order of the call's tokens."""

    conv: Tensor
    """``[B, C, A]``: what entered the convolution."""

    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor

    def kept(self, n_tokens: int) -> "_DeltaInputs":
        """Only the first `n_tokens` of the call."""
        active = self.active[:, :n_tokens]
        if not self.key.shape[1]:
            return self._replace(active=active)
        first = slice(n_tokens)
        ran = active_first(active, self.g[:, first].shape[1])
        g, beta = no_op_where_inactive(self.g[:, first], self.beta[:, first], ran)
        return _DeltaInputs(active, self.conv[..., first], self.key[:, first], self.value[:, first], g, beta)

    def select_rows(self, rows: Tensor) -> "_DeltaInputs":
        return _DeltaInputs(*(tensor[rows] for tensor in self))


def active_first(active: Tensor, width: int) -> Tensor:
    """``[B, width]``: which tokens are active after each row's active ones moved to its beginning."""
    return torch.arange(width, device=active.device) < active.sum(1, keepdim=True)


class RecurrentSlot(LinearAttentionLayer):
    """Convolution window and delta-rule state of one visit, with an exact way back.

    While recording, the inputs of the delta rule are kept since the last `crop`; `crop` recomputes the state that the remaining
    tokens lead to. transformers' own layer crops the convolution window only and leaves rejected tokens in the state.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.number_of_states != 1:
            raise ValueError(
                f"Recurrent layers with {self.number_of_states} states are not supported; mull knows layers with 1."
            )
        self._calls: list[_DeltaInputs] = []
        self._conv_before: Tensor | None = None
        self._state_before: Tensor | None = None
        self._pending_conv: Tensor | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back tokens that come from now on."""
        return self.record_past

    @property
    def window(self) -> Tensor:
        """The last inputs of the convolution, ``[B, C, kernel]``."""
        window = self.conv_states[0]
        assert window is not None
        return window

    @property
    def state(self) -> Tensor:
        """State of the delta rule, ``[B, H, K, V]``."""
        state = self.recurrent_states[0]
        assert state is not None
        return state

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        active: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Append a call's inputs to the window.

        Args:
            conv_states: ``[B, C, A]``, inactive tokens after a row's active ones.
            state_idx: Always 0.
            conv_kernel_size: Width of the window.
            active: ``[B, T]``, True for the tokens that run, in their order in the call; None for all.
            **kwargs: What other kinds of caches take.

        Returns:
            What the layer convolves: ``[B, C, kernel + A]``, or ``[B, C, A]`` in the first call.
        """
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(conv_states=conv_states, conv_kernel_size=conv_kernel_size)
        window = self.window
        if self.record_past:
            if self._conv_before is None:
                self._conv_before = window.clone()
                self._state_before = self.state.clone() if self.has_previous_state[0] else None
            self._pending_conv = conv_states
        full = torch.cat([window, conv_states], dim=-1)
        continues = self.has_previous_state[0]
        self.has_previous_state[0] = True
        # In place: the address stays fixed, which captured graphs rely on.
        width = window.shape[-1]
        window.copy_(full[..., -width:] if active is None else convolution_window(full, width, active.sum(1)))
        # The first call convolves what the layer would without a cache, so that its sums associate in the same order.
        return full if continues else conv_states

    def pass_over(self, h: Tensor) -> None:
        """Record tokens, of states `h` ``[B, T, D]``, that do not run the layer."""
        if self.record_past:
            nobody, empty = h.new_zeros(h.shape[:2], dtype=torch.bool), h.new_zeros(len(h), 0)
            self._calls.append(_DeltaInputs(nobody, *[empty] * 5))

    def record(self, active: Tensor | None, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> None:
        """Remember what the delta rule is about to be fed, if the cache is recording."""
        if not self.record_past:
            return
        assert self._pending_conv is not None, "the convolution comes before the delta rule"
        if active is None:
            active = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        self._calls.append(_DeltaInputs(active, self._pending_conv, key, value, g, beta))
        self._pending_conv = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` recorded tokens, or forget the way back with 0."""
        if tokens_to_remove and self._conv_before is not None:
            self._rewind(self._conv_before, sum(call.active.shape[1] for call in self._calls) + tokens_to_remove)
        self._calls = []
        self._conv_before = self._state_before = None

    def _rewind(self, window: Tensor, n_keep: int) -> None:
        state = self._state_before
        self.has_previous_state[0] = state is not None
        if state is None:
            state = torch.zeros_like(self.state)
        for call in self._calls:
            kept = call.kept(n_keep)
            n_keep -= kept.active.shape[1]
            if kept.key.shape[1]:
                self.has_previous_state[0] = True
                window = convolution_window(torch.cat([window, kept.conv], -1), window.shape[-1], kept.active.sum(1))
                state = replay_state(state, kept.key, kept.value, kept.g, kept.beta)
        self.window.copy_(window)
        self.state.copy_(state)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_conv_states_initialized[0]:
            rows = torch.arange(self.window.shape[0], device=self.window.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: indices, or a mask."""
        if not self.is_conv_states_initialized[0]:
            return
        rows = indices.to(self.window.device)
        self.conv_states[0] = self.window[rows]
        self.recurrent_states[0] = self.state[rows]
        self._calls = [call.select_rows(rows) for call in self._calls]
        if self._conv_before is not None:
            self._conv_before = self._conv_before[rows]
        if self._state_before is not None:
            self._state_before = self._state_before[rows]


class SlotCache(Cache):
    """Keys, values and recurrent states of a model that may visit a layer several times.

    It is a transformers `Cache`, so ``generate``, beam search and assisted decoding use it as they use their own. All slots
    crop, reorder, roll back, select rows and offload together.

    Args:
        text_config: Configuration of the backbone.
        offloading: Keep the slots in CPU memory and prefetch the next one (CUDA only).
    """

    def __init__(self, text_config: PreTrainedConfig, offloading: bool = False) -> None:
        self._text_config = text_config
        self.layer_kinds, self._layer_options = get_layer_types_and_kwargs(text_config)
        self.path: Path = ()
        """The path whose visits own the slots; empty until the first call."""
        self.shares = False
        """Whether all visits of an attention layer have the slot of its first, see ``share_first`` in `Stop`."""
        self.slot_numbers: list[int] = []
        """Of each visit."""
        self.n_tokens = 0
        """Tokens held, padding included; the same for every slot."""
        self._recording = False
        self._n_recorded = 0
        self._known: dict[int, Tensor] = {}
        """``[B, n_tokens]`` by number of the visit, False for tokens that offer no keys there; without visits where all do."""
        self.decisions: dict[Decision, Tensor] = {}
        """``[B]``: what was decided about a row for all calls that share the cache."""
        super().__init__(layers=[], offloading=offloading, offload_only_non_sliding=False)
        self.layers: list[Any] = []

    def bind(self, path: Path, shares: bool = False) -> None:
        """Create the slots of a path, or check that they are this path's.

        Args:
            path: The path.
            shares: Whether all visits of an attention layer have the slot of its first.

        Raises:
            ValueError: the cache already holds tokens of another path, or with other slots.
        """
        if self.path == path and self.shares == shares:
            return
        if self.path == path and self.n_tokens:
            raise ValueError(
                f"This cache holds {self.n_tokens} tokens of calls with another kind of stopping, and 'share_first' has one slot "
                "for all visits of a layer: keep adaptive the same for all calls that share a cache, or start a new cache."
            )
        if self.n_tokens:
            raise ValueError(
                f"This cache holds {self.n_tokens} tokens that ran {len(self.path)} layer visits, but the call asks for "
                f"{len(path)} visits in another order or number. Keep think_iterations and path the same for all calls that "
                "share a cache, or start a new cache."
            )
        self.path, self.shares, self.slot_numbers, self.layers = path, shares, [], []
        first: dict[int, int] = {}
        for visit in path:
            number = first.get(visit.layer)
            if number is None or not shares or self.layer_kinds[visit.layer] == "linear_attention":
                number = first[visit.layer] = len(self.layers)
                self.layers.append(self._new_slot(visit.layer))
            self.slot_numbers.append(number)
        if self._recording:
            super().activate_past_recording()

    def _new_slot(self, layer: int) -> Any:
        kind, options = self.layer_kinds[layer], self._layer_options[layer]
        return RecurrentSlot(**options) if kind == "linear_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)

    def has_gaps(self, visit: int) -> bool:
        """Whether a token offers no keys at this visit."""
        return visit in self._known

    def known(self, visit: int, new: Tensor | None, n_rows: int, n_new: int) -> Tensor | None:
        """``[B, n_tokens + T]``: which tokens offer keys at a visit, with those of the call; None for all.

        `new` ``[B, T]`` are those of the call, None for all of them.
        """
        past = self._known.get(visit)
        if past is None and new is None:
            return None
        device = (new if past is None else past).device  # type: ignore[union-attr]
        parts = ((past, self.n_tokens), (new, n_new))
        return torch.cat(
            [
                torch.ones(n_rows, width, dtype=torch.bool, device=device) if part is None else part
                for part, width in parts
            ],
            1,
        )

    def no_keys(self, h: Tensor) -> LayerKeys:
        """Keys and values of tokens that offer none, for states `h` ``[B, T, D]``."""
        config = self._text_config
        rows, n_tokens, width = *h.shape[:2], head_width(config)
        zeros = h.new_zeros(rows, config.num_key_value_heads, n_tokens, width)
        return LayerKeys(zeros, zeros, torch.zeros(rows, n_tokens, dtype=torch.bool, device=h.device))

    def note_known(self, visit: int, keys: LayerKeys) -> None:
        """Remember which of a call's tokens offer these keys and values at a visit."""
        known = self.known(visit, keys.known, len(keys.key), keys.key.shape[2])
        if known is not None:
            self._known[visit] = known

    def append(self, visit: int, keys: LayerKeys, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a call's tokens to a visit's slot; return those that attention looks at."""
        return self.update(keys.key, keys.value, self.slot_numbers[visit], *args, **kwargs)

    def replace(self, visit: int, keys: LayerKeys) -> None:
        """Put the keys and values of a call's tokens in the place of those that an earlier visit appended to the slot."""
        slot = self.layers[self.slot_numbers[visit]]
        slot.keys, slot.values = ending_in(slot.keys, keys.key), ending_in(slot.values, keys.value)

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished call."""
        self.n_tokens += n_tokens
        if self._recording:
            self._n_recorded += n_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held. The same for every slot, so the index does not matter."""
        return self.n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a slot returns for `query_length` new tokens."""
        slot = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(slot, CacheLayerMixin):
            return slot.get_mask_sizes(query_length)
        return self.n_tokens + query_length, 0

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on: whole windows of sliding layers, inputs of recurrent ones."""
        self._recording = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens from every slot; 0 forgets what recording kept.

        Raises:
            ValueError: a positive number, or more tokens than the cache holds.
            RuntimeError: the tokens were not recorded, which sliding and recurrent layers need.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative integer: crop(-{tokens_to_remove})."
            )
        if -tokens_to_remove > self.n_tokens:
            raise ValueError(f"Cannot take back {-tokens_to_remove} tokens: the cache holds {self.n_tokens}.")
        self._check_way_back(-tokens_to_remove)
        if self.n_tokens:
            for slot in self.layers:
                slot.crop(tokens_to_remove)
        self.n_tokens += tokens_to_remove
        if not self.n_tokens:
            self.decisions = {}
        self._n_recorded = 0
        self._known = {slot: known[:, : self.n_tokens] for slot, known in self._known.items()}

    def _check_way_back(self, n_removed: int) -> None:
        # Checked before the first slot is touched, so that a refused crop leaves the cache whole.
        needs_recording = any(
            isinstance(slot, RecurrentSlot)
            or (isinstance(slot, DynamicSlidingWindowLayer) and slot.get_seq_length() >= slot.sliding_window)
            for slot in self.layers
        )
        if needs_recording and n_removed > self._n_recorded:
            raise RuntimeError(
                f"Cannot take back {n_removed} tokens: recurrent layers and full sliding windows recorded "
                f"{self._n_recorded} since the last crop. Call cache.activate_past_recording() before the tokens that may have "
                "to be taken back."
            )

    def reset(self) -> None:
        """Forget every token, and the path with them."""
        self.path, self.layers, self.slot_numbers, self.n_tokens, self._n_recorded, self._known = (), [], [], 0, 0, {}
        self.decisions = {}

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these rows, in this order."""
        super().reorder_cache(beam_idx)
        self._known = {slot: known.index_select(0, beam_idx.to(known.device)) for slot, known in self._known.items()}
        self.decisions = {about: made[beam_idx.to(made.device)] for about, made in self.decisions.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._known = {slot: known.repeat_interleave(repeats, 0) for slot, known in self._known.items()}
        self.decisions = {about: made.repeat_interleave(repeats) for about, made in self.decisions.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: indices, or a mask."""
        super().batch_select_indices(indices)
        self._known = {slot: known[indices.to(known.device)] for slot, known in self._known.items()}
        self.decisions = {about: made[indices.to(made.device)] for about, made in self.decisions.items()}

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back tokens that come from now on."""
        return self._recording or all(kind == "full_attention" for kind in self.layer_kinds)


def ending_in(old: Tensor, new: Tensor) -> Tensor:
    """``old [B, H, N, W]`` with its last tokens replaced by the last of ``new [B, H, T, W]``, N and T in either order."""
    n = min(old.shape[2], new.shape[2])
    return torch.cat([old[:, :, : old.shape[2] - n], new[:, :, new.shape[2] - n :].to(old.device)], 2)


class GrowingMemory:
    """The `Memory` of one call on a growing cache."""

    def __init__(self, cache: SlotCache, stop: Stop | None = None) -> None:
        self.cache = cache
        self._offered = OfferedKeys("share_first" if cache.shares else stop)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer, the keys and values that attention looked at in this call; where visits share them."""

    def has_gaps(self, number: int) -> bool:
        """See `Memory`, also for the methods below."""
        return self.cache.has_gaps(number)

    def slot(
        self, number: int, visit: Visit, active: ActiveTokens | None, own: LayerKeys | None = None
    ) -> "GrowingSlot":
        """The slot of a visit."""
        attention = self.cache.layer_kinds[visit.layer] != "linear_attention"
        return GrowingSlot(self, number, active, self._offered.merge(visit, active, own) if attention else None)

    def pass_over(self, number: int, visit: Visit, h: Tensor, own: LayerKeys | None = None) -> None:
        """The tokens offer what their kind of stopping says, or fill the slot with what no query sees."""
        slot = self.cache.layers[self.cache.slot_numbers[number]]
        if isinstance(slot, RecurrentSlot):
            slot.pass_over(h)
            return
        self.store(number, self._offered.idle(visit, own) or self.cache.no_keys(h))

    def n_keys(self, number: int, n_new: int) -> int:
        """Keys that attention looks at in a visit, with those of `n_new` tokens of the call."""
        seen = self._seen.get(self.cache.path[number].layer)
        return (
            self.cache.get_mask_sizes(n_new, self.cache.slot_numbers[number])[0] if seen is None else seen[0].shape[2]
        )

    def store(self, number: int, keys: LayerKeys, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what a call's tokens offer at a visit; return the keys and values that attention looks at."""
        visit = self.cache.path[number]
        before, seen = self._offered.idle(visit, None), self._seen.get(visit.layer)
        self._offered.note(visit.layer, keys)
        self.cache.note_known(number, keys)
        if seen is None:
            seen = self.cache.append(number, keys, *args, **kwargs)
        elif keys is not before:
            self.cache.replace(number, keys)
            seen = ending_in(seen[0], keys.key), ending_in(seen[1], keys.value)
        if self.cache.shares:
            self._seen[visit.layer] = seen
        return seen


class GrowingSlot:
    """The `LayerMemory` of one visit on a growing cache.

    Args:
        memory: That of the call.
        number: Number of the visit in the cache's path.
        active: The tokens that run; None for all.
        merge: Makes their keys those of all tokens of the call; None where they are that, and for recurrent layers.
    """

    def __init__(self, memory: GrowingMemory, number: int, active: ActiveTokens | None, merge: Merge | None) -> None:
        self._memory = memory
        self._cache = memory.cache
        self._visit = number
        self._number = memory.cache.slot_numbers[number]
        self._active = active
        self._merge = merge

    @property
    def n_keys(self) -> int:
        """See `LayerMemory`, also for the methods below."""
        assert self._active is not None, "asked when a part of the tokens runs"
        return self._memory.n_keys(self._visit, self._active.mask.shape[1])

    @property
    def known(self) -> Tensor | None:
        """The newest `n_keys` tokens, which is what sliding windows keep."""
        if self._merge is None or self._active is None:
            return None
        known = self._cache.known(self._visit, self._merge.known, *self._active.mask.shape)
        return None if known is None else known[:, -self.n_keys :]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values, and return those that attention looks at."""
        if self._merge is None:
            return self._memory.store(self._visit, LayerKeys(key_states, value_states), *args, **kwargs)
        key, value = self._memory.store(self._visit, self._merge(key_states, value_states))
        return self._merge.of_rows(key), self._merge.of_rows(value)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The window before the call."""
        return self._cache.get_conv_state(self._number, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state before the call."""
        return self._cache.get_recurrent_state(self._number, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Append a call's inputs to the window."""
        if self._active is None:
            return self._cache.update_conv_state(conv_states, self._number, state_idx, **kwargs)
        inputs, mask = self._active.to_all_rows(conv_states), self._active.mask
        return self._active.of_rows(
            self._cache.update_conv_state(inputs, self._number, state_idx, active=mask, **kwargs)
        )

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Store the state after the call."""
        return self._cache.update_recurrent_state(recurrent_states, self._number, state_idx, **kwargs)

    def is_recording_past(self, layer_idx: int) -> bool:
        """True where a part of the tokens runs, or the call may be taken back."""
        return self._active is not None or self._cache.is_recording_past(self._number)

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the rule past inactive tokens, and record its inputs."""
        slot = self._cache.layers[self._number]
        if self._active is None:
            slot.record(None, key, value, g, beta)
            return rule(query, key, value, g=g, beta=beta, **kwargs)
        query, key, value, g, beta = map(self._active.to_all_rows, (query, key, value, g, beta))
        g, beta = no_op_where_inactive(g, beta, active_first(self._active.mask, g.shape[1]))
        slot.record(self._active.mask, key, value, g, beta)
        out, state = rule(query, key, value, g=g, beta=beta, **kwargs)
        return self._active.of_rows(out), state
