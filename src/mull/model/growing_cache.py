"""The cache: one slot per visit, and everything in it moves together.

transformers' layers address the cache by their own `layer_idx`, so a layer that is visited twice would overwrite itself. Here
each visit ``(layer, occurrence)`` of a path owns a slot, and the layer is handed a thin `SlotView` that sends its calls there.
Length, positions and validity belong to the cache: `SlotCache.n_tokens` counts tokens, whichever layers the path visits.

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

from mull.model.path import Path
from mull.ops.gated_delta import convolution_window, no_op_where_inactive, replay_state


class _DeltaInputs(NamedTuple):
    """What one call of a recurrent layer fed to its convolution and its delta rule. Inactive tokens stand at the end."""

    active: Tensor
    """``[B, T]`` in the order of the call's tokens, before inactive ones were moved to the end."""

    conv: Tensor
    """``[B, C, T]``: what entered the convolution."""

    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor

    def kept(self, n_tokens: int) -> "_DeltaInputs":
        """Only the first `n_tokens` of the call."""
        active = self.active[:, :n_tokens]
        g, beta = no_op_where_inactive(self.g[:, :n_tokens], self.beta[:, :n_tokens], _active_first(active))
        return _DeltaInputs(
            active, self.conv[..., :n_tokens], self.key[:, :n_tokens], self.value[:, :n_tokens], g, beta
        )

    def select_rows(self, rows: Tensor) -> "_DeltaInputs":
        return _DeltaInputs(*(tensor.index_select(0, rows) for tensor in self))


def _active_first(active: Tensor) -> Tensor:
    """A mask ``[B, T]`` after inactive tokens were moved to the end of their row."""
    return torch.arange(active.shape[1], device=active.device) < active.sum(1, keepdim=True)


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
            conv_states: ``[B, C, T]``; where `active` is given, inactive tokens stand at the end of their row.
            state_idx: Always 0.
            conv_kernel_size: Width of the window.
            active: ``[B, T]``, True for the tokens that count, in their original order; None for all.
            **kwargs: What other kinds of caches take.

        Returns:
            What the layer convolves: ``[B, C, kernel + T]``, or ``[B, C, T]`` in the first call.
        """
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(conv_states=conv_states, conv_kernel_size=conv_kernel_size)
        window = self.window
        if self.record_past:
            if not self._calls:
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
        if tokens_to_remove:
            self._rewind(sum(call.key.shape[1] for call in self._calls) + tokens_to_remove)
        self._calls = []
        self._conv_before = self._state_before = None

    def _rewind(self, n_keep: int) -> None:
        kept = []
        for call in self._calls:
            kept.append(call.kept(min(n_keep, call.key.shape[1])))
            n_keep -= kept[-1].key.shape[1]
        assert self._conv_before is not None
        window, state = self._conv_before, self._state_before
        self.has_previous_state[0] = state is not None
        if state is None:
            state = torch.zeros_like(self.state)
        for call in kept:
            if call.key.shape[1]:
                self.has_previous_state[0] = True
                window = convolution_window(torch.cat([window, call.conv], -1), window.shape[-1], call.active.sum(1))
                state = replay_state(state, call.key, call.value, call.g, call.beta)
        self.window.copy_(window)
        self.state.copy_(state)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._calls = []
        self._conv_before = self._state_before = None

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
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self.conv_states[0] = self.window.index_select(0, rows)
        self.recurrent_states[0] = self.state.index_select(0, rows)
        self._calls = [call.select_rows(rows) for call in self._calls]
        if self._conv_before is not None:
            self._conv_before = self._conv_before.index_select(0, rows)
        if self._state_before is not None:
            self._state_before = self._state_before.index_select(0, rows)


class SlotCache(Cache):
    """Keys, values and recurrent states of a model that may visit a layer several times.

    It is a transformers `Cache`, so ``generate``, beam search and assisted decoding use it as they use their own. All slots
    crop, reorder, roll back, select rows and offload together.

    Args:
        text_config: Configuration of the backbone.
        offloading: Keep the slots in CPU memory and prefetch the next one (CUDA only).
    """

    def __init__(self, text_config: PreTrainedConfig, offloading: bool = False) -> None:
        self.layer_kinds, self._layer_options = get_layer_types_and_kwargs(text_config)
        self.path: Path = ()
        """The path whose visits own the slots; empty until the first call."""
        self.n_tokens = 0
        """Tokens held, padding included; the same for every slot."""
        self._recording = False
        self._n_recorded = 0
        super().__init__(layers=[], offloading=offloading, offload_only_non_sliding=False)
        self.layers: list[Any] = []

    def bind(self, path: Path) -> None:
        """Create the slots of a path, or check that they are this path's.

        Raises:
            ValueError: the cache already holds tokens of another path.
        """
        if self.path == path:
            return
        if self.n_tokens:
            raise ValueError(
                f"This cache holds {self.n_tokens} tokens that ran {len(self.path)} layer visits, but the call asks for "
                f"{len(path)} visits in another order or number. Keep think_iterations and path the same for all calls that "
                "share a cache, or start a new cache."
            )
        self.path = path
        self.layers = [self._new_slot(visit.layer) for visit in path]
        if self._recording:
            super().activate_past_recording()

    def _new_slot(self, layer: int) -> Any:
        kind, options = self.layer_kinds[layer], self._layer_options[layer]
        return RecurrentSlot(**options) if kind == "linear_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)

    def view(self, slot: int, active: Tensor | None = None) -> "SlotView":
        """What the layer of visit number `slot` sees as its cache."""
        return SlotView(self, slot, active)

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
        self._n_recorded = 0

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
        self.path, self.layers, self.n_tokens, self._n_recorded = (), [], 0, 0

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back tokens that come from now on."""
        return self._recording or all(kind == "full_attention" for kind in self.layer_kinds)


class SlotView:
    """The cache as one visit's layer sees it: whatever `layer_idx` the layer passes, the visit's slot answers.

    Args:
        cache: The cache.
        slot: Number of the visit in the cache's path.
        active: ``[B, T]``, True for the tokens that count, where a recurrent layer was given rows with inactive tokens moved to
            their end; None when all count. Inactive tokens leave the recurrent state and the convolution window alone.
    """

    def __init__(self, cache: SlotCache, slot: int, active: Tensor | None = None) -> None:
        self.cache = cache
        self.slot = slot
        self.active = active

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values, each ``[B, heads, T, width]``, and return those the layer may attend to."""
        return self.cache.update(key_states, value_states, self.slot, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Convolution window ``[B, C, kernel]``, or None before the first token."""
        return self.cache.get_conv_state(self.slot, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Delta-rule state ``[B, H, K, V]``, or None before the first token."""
        return self.cache.get_recurrent_state(self.slot, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Append a call's inputs to the convolution window."""
        return self.cache.update_conv_state(conv_states, self.slot, state_idx, active=self.active, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Store the state after the call."""
        return self.cache.update_recurrent_state(recurrent_states, self.slot, state_idx, **kwargs)

    def is_recording_past(self, layer_idx: int) -> bool:
        """True where the layer must take its general path, which reports every token to the cache."""
        return self.active is not None or self.cache.is_recording_past(self.slot)

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run a delta rule of transformers, past inactive tokens, and record its inputs.

        Returns:
            Outputs ``[B, T, H, V]`` and the state after the last token.
        """
        if self.active is not None:
            g, beta = no_op_where_inactive(g, beta, _active_first(self.active))
        self.cache.layers[self.slot].record(self.active, key, value, g, beta)
        return rule(query, key, value, g=g, beta=beta, **kwargs)
