"""Drafting: the model's own heads propose the next tokens.

Drafts have no trunk states while they are drafted, so the keys and values that heads with a decoder layer make for them are
guesses. Every round therefore begins with a *window*: the heads run again over the last positions, now with the trunk's states
and the known tokens, and overwrite the guesses. If drafting paused, or a head was unused, its cache has gaps. They are filled
first, from the trunk states that we keep for the whole text.

Shapes: B rows, T tokens, W window, D model width, V vocabulary, K drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mull.layers.heads import MTPHeads, NativeHeads
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.ops.sampling import Sampling, draw, penalize, warp

CATCH_UP_TOKENS = 1024
"""Positions per row that idle heads catch up on in one pass, which bounds the memory of its mask."""


@dataclass(eq=False)
class Text:
    """The rows of a generation. They are left-aligned: in every buffer, a token's index is its position."""

    tokens: Tensor
    """``[B, capacity]``; only the known tokens mean anything."""

    n_known: Tensor
    """``[B]``: tokens known. The newest of them has not been through the trunk yet."""

    running: Tensor
    """``[B]``: rows that still grow."""

    states: Tensor | None
    """``[B, capacity, D]``: final-normed states of the trunk for all known tokens but the newest; None without heads."""

    seen: Tensor | None
    """``[B, V]``: tokens that occur in the row, for the repetition penalty; None without."""

    @property
    def newest(self) -> Tensor:
        """``[B]``: position of the newest token."""
        return self.n_known - 1


class Proposal(NamedTuple):
    """Drafted tokens."""

    tokens: Tensor
    """``[B, K]``."""

    distribution: Tensor | None
    """``[B, K, V]``: what each token was drawn from; None if the most probable ones were taken."""


class HeadProgress:
    """Up to which position the keys and values of each head are *final*: made from trunk states and known tokens.

    In a chain of heads, head ``k`` reads at position ``p`` the token at ``p + k``, so the last ``k - 1`` entries that it makes in
    a round come from drafts. One row after a round with three drafts that began when its newest token was at position 9
    (``=`` final, ``?`` guessed)::

        position  0 1 2 3 4 5 6 7 8
        head 1    = = = = = = = = =
        head 2    = = = = = = = = ?
        head 3    = = = = = = = ? ?

    If that round gains two tokens, the newest is at 11, and ``missing`` is 2, 3 and 4 positions for one, two and three drafts.
    Parallel and recursive heads guess no entries of their window, and pointwise heads have no entries at all.

    Args:
        heads: The heads.
        n_rows: Rows, of which nothing is final yet.
    """

    def __init__(self, heads: MTPHeads | NativeHeads, n_rows: int) -> None:
        n_caches = 0 if heads.pointwise else len(heads.heads)
        self._final = [[0] * n_rows for _ in range(n_caches)]
        self._chained = heads.sequential and not heads.recursive

    def missing(self, length: int, newest: Sequence[int], running: Sequence[bool]) -> int:
        """Positions before the newest ones that the heads have to run over to draft `length` tokens; at least 1."""
        rows = [row for row, runs in enumerate(running) if runs]
        return max([1, *(newest[row] - final[row] for final in self._final[:length] for row in rows)])

    def mark(self, length: int, upto: Sequence[int]) -> None:
        """The heads that draft `length` tokens have run over all positions before `upto`, one per row."""
        for head in range(min(length, len(self._final))):
            n_guessed = head if self._chained else 0
            self._final[head] = [max(position - n_guessed, 0) for position in upto]

    def first_missing(self, length: int) -> list[int]:
        """For each row, the first position that a head that drafts `length` tokens has no final entry for."""
        return [min(of_row) for of_row in zip(*self._final[:length], strict=True)]

    def usual(self, max_drafts: int) -> int:
        """Upper bound on `missing` after a round that drafted: positions that it confirmed, and those that it guessed."""
        if not self._final:
            return 1
        return max_drafts + 1 + (max_drafts - 1 if self._chained else 0)


class Drafter:
    """Drafts with the heads of a model.

    Args:
        model: A model with heads.
        cache: Its static cache, with a slot for each decoder layer of the heads.
        text: The rows.
        sampling: How tokens are chosen; the same for drafts and for the model.
    """

    def __init__(self, model: MullForCausalLM, cache: StaticSlotCache, text: Text, sampling: Sampling) -> None:
        assert model.mtp_heads is not None, "only a model with heads drafts"
        self.model = model
        self.heads = model.mtp_heads
        self.cache = cache
        self.text = text
        self.sampling = sampling
        self.progress = HeadProgress(self.heads, text.tokens.shape[0])

    @staticmethod
    def max_drafts(config: MTPConfig, wanted: int | None = None) -> int:
        """How many of the `wanted` tokens the heads can draft; None wants ``speculation_lookahead``.

        Recursive heads draft as many as wanted, others one per head.
        """
        wanted = config.speculation_lookahead if wanted is None else wanted
        return wanted if config.recursive else min(wanted, config.num_predict_tokens)

    def reset(self) -> None:
        """Begin with new rows."""
        self.progress = HeadProgress(self.heads, self.text.tokens.shape[0])

    def catch_up(self, length: int, newest: Sequence[int], running: Sequence[bool], window: int) -> None:
        """Run the heads over what they have missed, until a window of `window` positions suffices to draft `length` tokens."""
        while (missing := self.progress.missing(length, newest, running)) > window:
            width = min(missing, CATCH_UP_TOKENS)
            first = self.progress.first_missing(length)
            start = [max(min(begin, position - width), 0) for begin, position in zip(first, newest, strict=True)]
            end = [min(begin + width, position) for begin, position in zip(start, newest, strict=True)]
            positions = _span(torch.tensor(start, device=self.text.tokens.device), width)
            self._run_window(length, positions, n_keys=max(start) + width)
            self.progress.mark(length, end)

    def _run_window(self, length: int, positions: Tensor, n_keys: int) -> None:
        run = self._runner(StaticCall(positions, n_keys, n_valid=None))
        h = self._states_at(positions)
        for k in range(1, min(length, len(self.heads.heads)) + 1):
            embedded = self._embedded_at(positions + k) if self.heads.sequential else None
            out = run(k, h, embedded)
            h = out if self.heads.sequential else h

    def _runner(self, call: StaticCall) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """Runs heads ``(k, h, embedded)`` at the positions of a call."""
        assert self.text.states is not None
        inputs = self.model.model.fixed_layer_inputs(self.text.states[:, : call.positions.shape[1]], call)
        return partial(self.model.decode_head, cache=self.cache, call=call, inputs=inputs)

    def _states_at(self, positions: Tensor) -> Tensor:
        assert self.text.states is not None, "drafting needs the trunk's states"
        return self.text.states.gather(1, positions[..., None].expand(-1, -1, self.text.states.shape[-1]))

    def _embedded_at(self, positions: Tensor) -> Tensor:
        return self.model.model.embed_tokens(self.text.tokens.gather(1, positions))

    def draft(self, length: int, window: int, n_keys: int, uniform: Tensor) -> Proposal:
        """Propose tokens, and write them after the text.

        Args:
            length: K, at least 1.
            window: Positions to run again, at least ``progress.missing(length, ...)``.
            n_keys: Slots of the cache that attention reads.
            uniform: ``[B, K]``, random numbers for sampling.
        """
        newest = self.text.newest
        start = (newest - window).clamp(min=0)
        last = newest - 1 - start
        positions = _span(start, window)
        run = self._runner(StaticCall(positions, n_keys, n_valid=None))
        h = self._states_at(positions)
        chooser = _Chooser(self, uniform)
        if not self.heads.sequential:
            states = torch.stack([_at(run(k, h, None), last) for k in range(1, length + 1)], 1)
            for logits in self.model.lm_head(states).unbind(1):  # one pass through the unembedding for all
                chooser.choose(logits)
            return chooser.proposal()
        for k in range(1, length + 1):
            if k == 1 or not self.heads.recursive:
                h = run(k, h, self._embedded_at(positions + k))
                state = _at(h, last)
            else:
                # The chain continues after the text, in slots that the next round overwrites with final entries.
                run = self._runner(StaticCall((newest + k - 2)[:, None], n_keys, n_valid=None))
                embedded = self.model.model.embed_tokens(chooser.tokens[-1])[:, None]
                state = run(k, state[:, None], embedded)[:, 0]
            chooser.choose(self.model.lm_head(state))
        return chooser.proposal()


def _span(start: Tensor, width: int) -> Tensor:
    """``[B, W]``: `width` positions from `start` ``[B]``.

    In rows shorter than that it reaches past the text: such entries are overwritten before anything can see them.
    """
    return start[:, None] + torch.arange(width, device=start.device)


def _at(h: Tensor, index: Tensor) -> Tensor:
    """``[B, D]``: the state at one position of each row of ``[B, T, D]``."""
    return h.gather(1, index[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]


class _Chooser:
    """Chooses drafts one after the other, because the distribution of each may depend on those before it."""

    def __init__(self, drafter: Drafter, uniform: Tensor) -> None:
        self.sampling = drafter.sampling
        self.text = drafter.text
        self.uniform = uniform
        self.seen = drafter.text.seen
        self.tokens: list[Tensor] = []
        self.distributions: list[Tensor] = []

    def choose(self, logits: Tensor) -> None:
        """Choose the next draft from the logits of its head ``[B, V]``, and write it after the text."""
        k = len(self.tokens) + 1
        if self.sampling.greedy:
            token = penalize(logits, self.sampling, self.seen).argmax(-1)
        else:
            distribution = warp(logits, self.sampling, self.seen)
            token = draw(distribution, self.uniform[:, k - 1])
            self.distributions.append(distribution)
        self.tokens.append(token)
        if self.seen is not None:
            self.seen = self.seen.scatter(1, token[:, None], True)
        self.text.tokens.scatter_(1, (self.text.newest + k)[:, None], token[:, None])

    def proposal(self) -> Proposal:
        """All drafts chosen so far."""
        distributions = torch.stack(self.distributions, 1) if self.distributions else None
        return Proposal(torch.stack(self.tokens, 1), distributions)
