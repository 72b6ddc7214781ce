"""What a visit remembers of the tokens, and what its layer sees of that.

A decoder layer of transformers addresses its cache by its own index, so a layer that runs twice would overwrite itself. Here each
visit owns a slot, and the layer is handed the slot as if it were the cache: a `LayerMemory`. There are three kinds of memory:

* `CallMemory` lasts for one call: training, and prefill without a cache;
* `mull.model.growing_cache.GrowingMemory` appends to a `SlotCache`: ``generate`` of transformers;
* `mull.model.fixed_cache.FixedMemory` writes into a `StaticSlotCache`: `mull.generate`.

Shapes: B batch, T tokens of the call, A tokens that run in the row with most of them, H heads, W width of a head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mull.model.path import Visit


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens of a call that run a visit, and where to find them."""

    mask: Tensor
    """``[B, T]``: True for tokens that run."""

    index: Tensor
    """``[B, A]``: positions of a row's active tokens in their order; rows with fewer go on with other tokens of theirs."""

    filled: Tensor
    """``[B, A]``: True where `index` names an active token."""

    @classmethod
    def of(cls, mask: Tensor) -> "ActiveTokens":
        """The tokens where `mask` ``[B, T]`` is True."""
        index = inactive_last(mask)[:, : int(mask.sum(1).max())]
        return cls(mask, index, mask.gather(1, index))

    @classmethod
    def reordered(cls, mask: Tensor) -> "ActiveTokens":
        """All tokens run, those where `mask` ``[B, T]`` is False after the others: shapes do not depend on it."""
        return cls(mask, inactive_last(mask), torch.ones_like(mask))

    @property
    def any(self) -> bool:
        """Whether a token runs."""
        return self.index.shape[1] > 0

    def gather(self, x: Tensor) -> Tensor:
        """``[B or 1, T, ...]`` to ``[B, A, ...]``."""
        rows = x.expand(self.index.shape[0], *x.shape[1:])
        return rows.gather(1, _like(self.index, rows))

    def scatter(self, x: Tensor, new: Tensor) -> Tensor:
        """``x [B, T, ...]`` with the entries of active tokens replaced by those of `new` ``[B, A, ...]``."""
        index = _like(self.index, x)
        return x.scatter(1, index, torch.where(_like(self.filled, x), new, x.gather(1, index)))


def inactive_last(mask: Tensor) -> Tensor:
    """``[B, T]``: the positions where `mask` is True, then the others, each in their order."""
    return (~mask).long().argsort(dim=1, stable=True)


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])


class LayerKeys(NamedTuple):
    """Keys and values that the tokens of a call offer in one slot."""

    key: Tensor
    """``[B, H, T, W]``."""

    value: Tensor
    known: Tensor
    """``[B, T]``: False for a token that offers nothing, because it never ran the layer."""


class LastKeys(dict[int, LayerKeys]):
    """``last_kv``: a token that does not run a visit offers the keys and values of the last time it ran that layer.

    It belongs to one call, whose visits it follows in their order: by layer, what the tokens offered at its last visit.
    """

    def merge(self, layer: int, active: ActiveTokens) -> "Merge":
        """The merge of the layer's next visit."""
        return Merge(self, layer, active, self.get(layer))


@dataclass(frozen=True)
class Merge:
    """Extends the keys and values of the active tokens to all tokens of the call."""

    last: LastKeys
    layer: int
    active: ActiveTokens
    before: LayerKeys | None
    """Read when the visit begins and not again: gradient checkpointing may run the layer a second time."""

    @property
    def known(self) -> Tensor:
        """``[B, T]``: tokens that offer keys and values after the merge."""
        return self.active.mask if self.before is None else self.active.mask | self.before.known

    def __call__(self, key: Tensor, value: Tensor) -> LayerKeys:
        """``[B, H, A, W]`` each to ``[B, H, T, W]``."""
        merged = LayerKeys(self._merged(key, 0), self._merged(value, 1), self.known)
        self.last[self.layer] = merged
        return merged

    def _merged(self, new: Tensor, field: int) -> Tensor:
        shape = (*new.shape[:2], self.active.mask.shape[1], new.shape[-1])
        old = new.new_zeros(shape) if self.before is None else self.before[field]
        # The tokens' dimension comes second where tokens are scattered.
        return self.active.scatter(old.transpose(1, 2), new.transpose(1, 2)).transpose(1, 2)


def head_width(config: PreTrainedConfig) -> int:
    """Width of an attention head of the backbone."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class LayerMemory(Protocol):
    """The cache as the layer of one visit sees it. Whatever `layer_idx` the layer passes, the visit's slot answers."""

    @property
    def n_keys(self) -> int:
        """Keys that attention of this visit looks at."""

    @property
    def known(self) -> Tensor | None:
        """``[B, n_keys]``: False for keys that no query may see; None if all tokens run."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the call's keys and values, ``[B, H, A, W]`` each, and return all that attention looks at."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Convolution window ``[B, C, kernel]``; None before the first token."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Delta-rule state ``[B, H, K, V]``; None before the first token."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Append the convolution's inputs ``[B, C, A]`` to the window, and return what the layer convolves."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor | None:
        """Store the state after the call."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the layer must take its general path, which hands every token to the memory."""

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run a delta rule of transformers past inactive tokens. Outputs ``[B, A, H, V]``, and the state after the call."""


class Memory(Protocol):
    """What the visits of one call remember."""

    def has_gaps(self, number: int) -> bool:
        """Whether earlier calls left tokens in the slot of visit number `number` that no query may see."""

    def slot(self, number: int, visit: Visit, active: ActiveTokens | None) -> LayerMemory:
        """The slot of visit number `number` of the path; `active` None means that every token runs."""

    def pass_over(self, number: int, visit: Visit, h: Tensor) -> None:
        """No token of the call, with states `h` ``[B, T, D]``, runs this visit."""


class CallMemory:
    """Memory for one call without a past."""

    def __init__(self) -> None:
        self._last = LastKeys()

    def has_gaps(self, number: int) -> bool:
        """There are no earlier calls."""
        return False

    def slot(self, number: int, visit: Visit, active: ActiveTokens | None) -> "CallSlot":
        """The slot of a visit."""
        return CallSlot(None if active is None else self._last.merge(visit.layer, active))

    def pass_over(self, number: int, visit: Visit, h: Tensor) -> None:
        """Nothing happens: what the tokens offered before is what they offer later."""


class CallSlot:
    """The memory of one visit in a call without a past. Recurrent layers start from nothing and leave nothing."""

    def __init__(self, merge: Merge | None) -> None:
        self._merge = merge

    @property
    def n_keys(self) -> int:
        """Tokens of the call."""
        assert self._merge is not None, "without a policy, a call without a past needs no memory"
        return self._merge.active.mask.shape[1]

    @property
    def known(self) -> Tensor | None:
        """See `LayerMemory`, also for the methods below."""
        return None if self._merge is None else self._merge.known

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Extend the keys and values to all tokens of the call."""
        if self._merge is None:
            return key_states, value_states
        keys = self._merge(key_states, value_states)
        return keys.key, keys.value

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """There is no past."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """There is no past."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The inputs alone."""
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> None:
        """Nothing follows this call."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """There is one path only without a past."""
        return False

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Inactive tokens come last in their row, so they cannot reach active ones."""
        return rule(query, key, value, g=g, beta=beta, **kwargs)
