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

from mull.model.configs import Stop
from mull.model.path import Visit

Decision = tuple[Any, ...]
"""What was decided about a row: a visit for layer routers, ``("expert", iteration)`` for gates."""


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens of a call that run a visit, and where to find them. R rows have some."""

    mask: Tensor
    """``[B, T]``: True for tokens that run."""

    index: Tensor
    """``[R, A]``: positions of a row's active tokens in their order; rows with fewer go on with other tokens of theirs."""

    filled: Tensor
    """``[R, A]``: True where `index` names an active token."""

    rows: Tensor | None = None
    """``[R]``: which rows they are; None for all B rows."""

    @classmethod
    def of(cls, mask: Tensor) -> "ActiveTokens":
        """The tokens where `mask` ``[B, T]`` is True. Rows that have none are left out."""
        if torch.compiler.is_compiling():  # values cannot be read, so shapes are those of all tokens
            index = inactive_last(mask)
            return cls(mask, index, mask.gather(1, index))
        counts = mask.sum(1).tolist()
        busy = [row for row, count in enumerate(counts) if count]
        rows = None if len(busy) in (0, len(mask)) else torch.tensor(busy, device=mask.device)
        of_rows = mask if rows is None else mask[rows]
        index = inactive_last(of_rows)[:, : max(counts)]
        return cls(mask, index, of_rows.gather(1, index), rows)

    @classmethod
    def reordered(cls, mask: Tensor) -> "ActiveTokens":
        """All tokens run, those where `mask` ``[B, T]`` is False after the others: shapes do not depend on it."""
        return cls(mask, inactive_last(mask), torch.ones_like(mask))

    @property
    def any(self) -> bool:
        """Whether a token runs."""
        return self.index.shape[1] > 0

    @property
    def _single(self) -> bool:
        """Rows have one token each, so nothing moves inside of them."""
        return self.mask.shape[1] == 1

    def of_rows(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[R, ...]``."""
        return x if self.rows is None else x[self.rows]

    def to_all_rows(self, x: Tensor) -> Tensor:
        """``[R, ...]`` to ``[B, ...]``, with zeros in the other rows."""
        return x if self.rows is None else x.new_zeros(len(self.mask), *x.shape[1:]).index_copy(0, self.rows, x)

    def gather(self, x: Tensor) -> Tensor:
        """``[B or 1, T, ...]`` to ``[R, A, ...]``."""
        rows = x.expand(len(self.index), *x.shape[1:]) if len(x) == 1 else self.of_rows(x)
        return rows if self._single else rows.gather(1, _like(self.index, rows))

    def scatter(self, x: Tensor, new: Tensor) -> Tensor:
        """``x [B, T, ...]`` with the entries of active tokens replaced by those of `new` ``[R, A, ...]``."""
        if self._single and not torch.compiler.is_compiling():
            out = new  # every row that is there has its token
        elif self._single:
            out = torch.where(_like(self.filled, x), new, x)
        else:
            old = self.of_rows(x)
            index = _like(self.index, old)
            out = old.scatter(1, index, torch.where(_like(self.filled, old), new, old.gather(1, index)))
        return out if self.rows is None else x.index_copy(0, self.rows, out)


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
    known: Tensor | None = None
    """``[B, T]``: False for a token that offers nothing; None if all offer something."""


class OfferedKeys:
    """What tokens offer in the visits that they do not run, see `Stop`. It belongs to one call, and follows its visits in order.

    Args:
        stop: Which of the meanings; None for a call without a policy, in which every token runs.
    """

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self._latest: dict[int, LayerKeys] = {}

    def note(self, layer: int, keys: LayerKeys) -> None:
        """The tokens offer these at a layer's latest visit."""
        if self._stop in ("last_kv", "share_first"):
            self._latest[layer] = keys

    def idle(self, visit: Visit, own: LayerKeys | None) -> LayerKeys | None:
        """What tokens offer in a layer's next visit if they do not run it; `own` is projected from their states."""
        if self._stop == "own_state":
            return own
        # A layer may be run anew with another state, as decoder layers are after each iteration.
        return self._latest.get(visit.layer) if visit.occurrence else None

    def merge(self, visit: Visit, active: ActiveTokens | None, own: LayerKeys | None) -> "Merge | None":
        """How the keys of tokens that run a layer's next visit, all for None, become those of all; None if they are those."""
        idle = self.idle(visit, own)
        shares = self._stop == "share_first" and idle is not None
        return Merge(active, idle, shares) if shares or active is not None else None


@dataclass(frozen=True)
class Merge:
    """Extends the keys and values of the active tokens to all tokens of the call."""

    active: ActiveTokens | None
    """None for all."""

    idle: LayerKeys | None
    """What tokens offer if they do not run the visit; None for nothing."""

    shares: bool = False
    """Whether tokens that run it offer that, too, if they have it; see ``share_first`` in `Stop`."""

    @property
    def complete(self) -> bool:
        """Whether nothing new is offered."""
        return self.shares and self.idle is not None and self.idle.known is None

    @property
    def known(self) -> Tensor | None:
        """``[B, T]``: tokens that offer keys and values after the merge; None for all."""
        if self.active is None or (self.idle is not None and self.idle.known is None):
            return None
        return self.active.mask if self.idle is None or self.idle.known is None else self.active.mask | self.idle.known

    def __call__(self, key: Tensor, value: Tensor) -> LayerKeys:
        """``[R, H, A, W]`` each to ``[B, H, T, W]``."""
        if self.complete and self.idle is not None:
            return self.idle
        old_key, old_value = (None, None) if self.idle is None else (self.idle.key, self.idle.value)
        return LayerKeys(self._merged(key, old_key), self._merged(value, old_value), self.known)

    def of_rows(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[R, ...]``."""
        return x if self.active is None else self.active.of_rows(x)

    def _merged(self, new: Tensor, old: Tensor | None) -> Tensor:
        if self.active is not None:
            before = new.new_zeros(len(self.active.mask), new.shape[1], self.active.mask.shape[1], new.shape[-1])
            before = before if old is None else old
            # The tokens' dimension comes second where tokens are scattered.
            new = self.active.scatter(before.transpose(1, 2), new.transpose(1, 2)).transpose(1, 2)
        if self.shares and self.idle is not None and self.idle.known is not None:
            assert old is not None, "there are idle keys"
            new = torch.where(self.idle.known[:, None, :, None], old, new)
        return new


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
        """Store the call's keys and values, ``[R, H, A, W]`` each, and return all that attention looks at."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Convolution window ``[B, C, kernel]``; None before the first token."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Delta-rule state ``[B, H, K, V]``; None before the first token."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Append the convolution's inputs ``[R, C, A]`` to the window, and return what the layer convolves."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor | None:
        """Store the state after the call."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the layer must take its general path, which hands every token to the memory."""

    def delta_rule(
        self, rule: Any, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run a delta rule of transformers past inactive tokens. Outputs ``[R, A, H, V]``, and the state after the call."""


class Memory(Protocol):
    """What the visits of one call remember."""

    def has_gaps(self, number: int) -> bool:
        """Whether earlier calls left tokens in the slot of visit number `number` that no query may see."""

    def slot(self, number: int, visit: Visit, active: ActiveTokens | None, own: LayerKeys | None = None) -> LayerMemory:
        """The slot of visit number `number` of the path.

        Args:
            number: Number of the visit.
            visit: The visit.
            active: The tokens that run; None for all.
            own: Keys and values from the states of those that do not; None if they do not offer these.
        """

    def pass_over(self, number: int, visit: Visit, h: Tensor, own: LayerKeys | None = None) -> None:
        """No token of the call, with states `h` ``[B, T, D]``, runs this visit."""


class CallMemory:
    """Memory for one call without a past."""

    def __init__(self, stop: Stop = "last_kv") -> None:
        self._offered = OfferedKeys(stop)

    def has_gaps(self, number: int) -> bool:
        """There are no earlier calls."""
        return False

    def slot(self, number: int, visit: Visit, active: ActiveTokens | None, own: LayerKeys | None = None) -> "CallSlot":
        """The slot of a visit."""
        # What tokens offer is looked up now and not again: gradient checkpointing may run the layer a second time.
        return CallSlot(self._offered, visit.layer, self._offered.merge(visit, active, own))

    def pass_over(self, number: int, visit: Visit, h: Tensor, own: LayerKeys | None = None) -> None:
        """Nothing happens: what the tokens offered before is what they offer later."""


class CallSlot:
    """The memory of one visit in a call without a past. Recurrent layers start from nothing and leave nothing."""

    def __init__(self, offered: OfferedKeys, layer: int, merge: Merge | None) -> None:
        self._offered = offered
        self._layer = layer
        self._merge = merge

    @property
    def n_keys(self) -> int:
        """Tokens of the call."""
        assert self._merge is not None, "asked when a part of the tokens runs"
        assert self._merge.active is not None, "asked when a part of the tokens runs"
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
            self._offered.note(self._layer, LayerKeys(key_states, value_states))
            return key_states, value_states
        keys = self._merge(key_states, value_states)
        self._offered.note(self._layer, keys)
        return self._merge.of_rows(keys.key), self._merge.of_rows(keys.value)

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
