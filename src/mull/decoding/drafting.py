"""Drafting: the model's own heads propose the next tokens, from true hidden states only.

The heads' keys and values are always made from the trunk's states of tokens that are part of the text. A round therefore begins
with a *window*: the heads run again over the last positions of each row, which writes the entries of the tokens that came since,
and overwrites those that were made from drafts. Positions that no round has covered for a while (drafting paused, or a
head was not in use) are caught up on first, from the trunk's states of the whole text, which are kept.

Shapes: B rows, T tokens, W window, D model width, V vocabulary, K drafts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.ops.sampling import Sampling, draw, penalize, warp

CATCH_UP_TOKENS = 1024
"""Positions per row that idle heads catch up on in one pass, which bounds the memory of its mask."""


@dataclass(eq=False)
class Text:
    """The rows of a generation. They are left-aligned: a token's index is its position, in every buffer."""

    tokens: Tensor
    """``[B, capacity]``; what stands behind the known tokens means nothing."""

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
    """What the heads proposed."""

    tokens: Tensor
    """``[B, K]``."""

    law: Tensor | None
    """``[B, K, V]``: the distribution that each token was drawn from; None where the most probable one was taken."""


class Drafter:
    """Drafts with the heads of a model.

    Args:
        model: A `MullForCausalLM` with heads.
        cache: Its static cache, with a slot for each block of the heads.
        text: The rows.
        sampling: How tokens are chosen; the same for drafts and for the model.
    """

    def __init__(self, model: Any, cache: StaticSlotCache, text: Text, sampling: Sampling) -> None:
        self.model = model
        self.heads = model.mtp_heads
        self.cache = cache
        self.text = text
        self.sampling = sampling
        self._has_cache = not self.heads.pointwise
        self._n_modules = len(self.heads.heads)
        self._final: list[list[int]] = []
        """For each module and row, the number of positions whose entries are final: made from tokens of the text."""

    @staticmethod
    def longest(config: Any, lookahead: int | None = None) -> int:
        """Most tokens that the heads of a `MTPConfig` can draft: recursive ones as many as wanted, others one per head."""
        wanted: int = config.speculation_lookahead if lookahead is None else lookahead
        return wanted if config.recursive else min(wanted, config.num_predict_tokens)

    def reset(self) -> None:
        """Begin with new rows."""
        self._final = [[0] * self.text.tokens.shape[0] for _ in range(self._n_modules)]

    def steady_window(self, longest: int) -> int:
        """Positions that a round has to cover at most after one that drafted: what that made known, or filled from drafts."""
        if not self._has_cache:
            return 1
        return longest + 1 + (longest - 1 if self._chained else 0)

    @property
    def _chained(self) -> bool:
        return bool(self.heads.sequential and not self.heads.recursive)

    def _in_use(self, length: int) -> range:
        return range(1 if self.heads.recursive else length)

    def lags(self, newest: list[int], running: list[bool]) -> list[int]:
        """Positions that a round has to cover, given the newest position of each row, by its number of drafts, from 1."""
        found = [1] * (self._n_modules if self._has_cache else 1)
        if self._has_cache:
            for module, final in enumerate(self._final):
                behind = [place - end for place, end, runs in zip(newest, final, running, strict=True) if runs]
                found[module] = max([found[max(module - 1, 0)], *behind])
        return found

    def lag(self, length: int, newest: list[int], running: list[bool]) -> int:
        """The same for one number of drafts."""
        lags = self.lags(newest, running)
        return lags[min(length, len(lags)) - 1]

    def mark_final(self, length: int, newest: list[int]) -> None:
        """Note that a window that ends before `newest` has been run: what it made from tokens of the text is final."""
        if not self._has_cache:
            return
        for module in self._in_use(length):
            # Module k reads the token k behind its position, so its last entries were made from drafts.
            ahead = module if self._chained else 0
            self._final[module] = [max(position - ahead, 0) for position in newest]

    def catch_up(self, length: int, newest: list[int], running: list[bool], window: int) -> None:
        """Run the heads over what they have missed, until `window` positions are enough for a round."""
        n_rows = len(newest)
        while (lag := self.lag(length, newest, running)) > window:
            width = min(lag, CATCH_UP_TOKENS)
            final = [min(self._final[module][row] for module in self._in_use(length)) for row in range(n_rows)]
            start = [max(min(first, position - width), 0) for first, position in zip(final, newest, strict=True)]
            end = [min(first + width, position) for first, position in zip(start, newest, strict=True)]
            positions = _span(torch.tensor(start, device=self.text.tokens.device), width)
            self._run_window(length, positions, n_keys=max(start) + width)
            self.mark_final(length, end)

    def _run_window(self, length: int, positions: Tensor, n_keys: int) -> None:
        run = self._runner(StaticCall(positions, n_keys, n_valid=None))
        h = self._states_at(positions)
        for k in range(1, len(self._in_use(length)) + 1):
            embedded = self._embedded_at(positions + k) if self.heads.sequential else None
            out = run(k, h, embedded)
            h = out if self.heads.sequential else h

    def _runner(self, call: StaticCall) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """Runs heads ``(k, h, embedded)`` at the positions of a call."""
        assert self.text.states is not None
        sides = self.model.static_sides(self.text.states[:, : call.positions.shape[1]], call)

        def run(k: int, h: Tensor, embedded: Tensor | None) -> Tensor:
            states: Tensor = self.model.decode_head(k, h, embedded, self.cache, call, sides)
            return states

        return run

    def _states_at(self, positions: Tensor) -> Tensor:
        assert self.text.states is not None, "drafting needs the trunk's states"
        return self.text.states.gather(1, positions[..., None].expand(-1, -1, self.text.states.shape[-1]))

    def _embedded_at(self, positions: Tensor) -> Tensor:
        embedded: Tensor = self.model.model.embed_tokens(self.text.tokens.gather(1, positions))
        return embedded

    def draft(self, length: int, window: int, n_keys: int, uniform: Tensor) -> Proposal:
        """Propose tokens, and write them behind the text.

        Args:
            length: K, at least 1.
            window: Positions to run again; see `lag`.
            n_keys: Slots of the cache to look at.
            uniform: ``[B, K]``, random numbers for sampling.
        """
        if self.heads.recursive:
            return self._draft_recursively(length, window, n_keys, uniform)
        newest = self.text.newest
        start = (newest - window).clamp(min=0)
        last = newest - 1 - start
        positions = _span(start, window)
        run = self._runner(StaticCall(positions, n_keys, n_valid=None))
        h = self._states_at(positions)
        chooser = _Chooser(self, uniform)
        if not self.heads.sequential:
            outs = [_at(run(k, h, None), last) for k in range(1, length + 1)]
            return chooser.choose_all(torch.stack(outs, 1))
        for k in range(1, length + 1):
            h = run(k, h, self._embedded_at(positions + k))
            chooser.choose(self.model.lm_head(_at(h, last)))
        return chooser.proposal()

    def _draft_recursively(self, length: int, window: int, n_keys: int, uniform: Tensor) -> Proposal:
        newest = self.text.newest
        start = (newest - window).clamp(min=0)
        positions = _span(start, window)
        run = self._runner(StaticCall(positions, n_keys, n_valid=None))
        chooser = _Chooser(self, uniform)
        out = run(1, self._states_at(positions), self._embedded_at(positions + 1))
        state = _at(out, newest - 1 - start)
        chooser.choose(self.model.lm_head(state))
        for k in range(2, length + 1):
            # The chain goes on behind the text, in slots that the next round overwrites with true entries.
            run = self._runner(StaticCall((newest + k - 2)[:, None], n_keys, n_valid=None))
            embedded = self.model.model.embed_tokens(chooser.tokens[-1])[:, None]
            state = run(k, state[:, None], embedded)[:, 0]
            chooser.choose(self.model.lm_head(state))
        return chooser.proposal()


def _span(start: Tensor, width: int) -> Tensor:
    """``[B, W]``: `width` positions from `start` ``[B]``.

    Rows that are shorter reach behind their text: such entries are overwritten before anything can see them.
    """
    return start[:, None] + torch.arange(width, device=start.device)


def _at(h: Tensor, index: Tensor) -> Tensor:
    """``[B, D]``: the state at one position of each row of ``[B, T, D]``."""
    return h.gather(1, index[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]


class _Chooser:
    """Chooses drafts one after the other, so that each one's law may depend on those before it."""

    def __init__(self, drafter: Drafter, uniform: Tensor) -> None:
        self.model = drafter.model
        self.sampling = drafter.sampling
        self.text = drafter.text
        self.uniform = uniform
        self.seen = drafter.text.seen
        self.tokens: list[Tensor] = []
        self.laws: list[Tensor] = []

    def choose(self, logits: Tensor) -> None:
        """Choose the next draft from the logits of its head ``[B, V]``, and write it behind the text."""
        k = len(self.tokens) + 1
        if self.sampling.greedy:
            token = penalize(logits, self.sampling, self.seen).argmax(-1)
        else:
            law = warp(logits, self.sampling, self.seen)
            token = draw(law, self.uniform[:, k - 1])
            self.laws.append(law)
        self.tokens.append(token)
        if self.seen is not None:
            self.seen = self.seen.scatter(1, token[:, None], True)
        self.text.tokens.scatter_(1, (self.text.newest + k)[:, None], token[:, None])

    def choose_all(self, states: Tensor) -> Proposal:
        """Choose all drafts from the states of parallel heads ``[B, K, D]``: one pass through the unembedding."""
        logits = self.model.lm_head(states)
        for k in range(states.shape[1]):
            self.choose(logits[:, k])
        return self.proposal()

    def proposal(self) -> Proposal:
        """All that were chosen."""
        return Proposal(torch.stack(self.tokens, 1), torch.stack(self.laws, 1) if self.laws else None)
