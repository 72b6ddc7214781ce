"""Rounds of decoding, on static buffers: draft, verify in one pass, accept, and commit what was accepted.

A round waits for the host once, at its end. Everything before is one function of the buffers, with shapes that depend on the
draft length alone, so it can be compiled, and captured as a CUDA graph.

Shapes: B rows, T tokens, D model width, V vocabulary, K drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mull.decoding.drafting import Drafter, Proposal, Text
from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.model.path import Path
from mull.ops.sampling import Sampling, Verdict, accept, accept_greedy, draw, penalize, seen_along, warp

PREFILL_TOKENS = 2048
"""Prompt tokens per row that one pass takes, which bounds the memory of its mask."""

NO_TOKEN = -1
"""Stands behind the last token that a row gained in a round."""


@dataclass(frozen=True)
class Size:
    """What the buffers of a decoder are made for."""

    n_rows: int
    capacity: int
    """Tokens per row: prompt, new ones and the drafts of a round."""

    longest: int
    """Most drafts of a round; 0 for a decoder that never drafts."""

    @staticmethod
    def slack(longest: int) -> int:
        """Slots behind a row's last token that a round may write to: its drafts, or a window over a row that is shorter."""
        return 3 * longest + 2


class Decoder:
    """Decodes the rows of one batch at a time.

    Args:
        model: A `MullForCausalLM` in evaluation mode.
        path: The visits of every pass.
        sampling: How tokens are chosen.
        size: Rows and tokens.
        compiled: Run rounds through ``torch.compile``.
    """

    def __init__(self, model: Any, path: Path, sampling: Sampling, size: Size, compiled: bool = False) -> None:
        weight = model.lm_head.weight
        device = weight.device
        self.model = model
        self.path = path
        self.sampling = sampling
        self.size = size
        heads = model.mtp_heads if size.longest else None
        n_blocks = 0 if heads is None or heads.pointwise else len(heads.heads)
        self.cache = StaticSlotCache(
            model.config.get_text_config(),
            path,
            size.n_rows,
            size.capacity,
            dtype=weight.dtype,
            device=device,
            n_head_blocks=n_blocks,
        )
        self.text = Text(
            tokens=torch.zeros(size.n_rows, size.capacity, dtype=torch.long, device=device),
            n_known=torch.ones(size.n_rows, dtype=torch.long, device=device),
            running=torch.ones(size.n_rows, dtype=torch.bool, device=device),
            states=None if heads is None else weight.new_zeros(size.n_rows, size.capacity, weight.shape[1]),
            seen=torch.zeros(size.n_rows, weight.shape[0], dtype=torch.bool, device=device)
            if sampling.needs_seen
            else None,
        )
        self.drafter = None if heads is None else Drafter(model, self.cache, self.text, sampling)
        self.uniform = torch.zeros(size.n_rows, 2 * size.longest + 1, dtype=torch.float64, device=device)
        """Random numbers of a round: K for drawing drafts, then K for accepting them and one for the last token."""
        self._row_numbers = torch.arange(size.n_rows, device=device)[:, None]
        self._newest: list[int] = []
        self._running: list[bool] = []
        self.has_fixed_shapes = self.keeps(model, compiled)
        """Whether rounds are prepared once per draft length."""
        self._compiled = compiled
        self._rounds: dict[int, Callable[[], Tensor]] = {}

    @staticmethod
    def keeps(model: Any, compiled: bool) -> bool:
        """Whether a decoder of this model prepares its rounds, so that it pays to keep it for further calls."""
        return compiled or _captures(model)

    def must_warm_up(self, length: int) -> bool:
        """Whether the next round with this draft length is the first, and has to be prepared."""
        return self.has_fixed_shapes and length not in self._rounds

    def start(self, prompts: Sequence[Sequence[int]], generator: torch.Generator | None) -> list[int]:
        """Read the prompts, and choose the first token of each row.

        Args:
            prompts: Tokens of each row, at least one.
            generator: Source of random numbers; None for greedy decoding.
        """
        self._load(prompts)
        device = self.text.tokens.device
        lengths = self.text.n_known.clone()
        h_last = self.model.lm_head.weight.new_zeros(len(prompts), self.model.lm_head.weight.shape[1])
        longest = max(map(len, prompts))
        for first in range(0, longest, PREFILL_TOKENS):
            width = min(PREFILL_TOKENS, longest - first)
            positions = (first + torch.arange(width, device=device)).expand(len(prompts), -1)
            n_valid = (lengths - first).clamp(0, width)
            call = StaticCall(positions, first + width, n_valid, fresh=first == 0)
            h = self.model.decode(self.text.tokens[:, first : first + width], self.cache, call)
            if self.text.states is not None:
                self.text.states[:, first : first + width] = h
            ends_here = (lengths > first) & (lengths <= first + width)
            index = (lengths - 1 - first).clamp(0, width - 1)
            last = h.gather(1, index[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]
            h_last = torch.where(ends_here[:, None], last, h_last)
        self._draw_uniform(generator)
        token = self._choose(self.model.lm_head(h_last))
        self._append(token[:, None], torch.ones_like(lengths))
        if self.drafter is not None:
            self.drafter.reset()
        self._newest = [len(prompt) for prompt in prompts]
        self._running = [True] * len(prompts)
        tokens: list[int] = token.tolist()
        return tokens

    def _load(self, prompts: Sequence[Sequence[int]]) -> None:
        self.cache.reset()
        text = self.text
        longest = max(map(len, prompts))
        rows = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        text.tokens[:, :longest] = rows.to(text.tokens.device)
        text.n_known.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        text.running.fill_(True)
        if text.seen is not None:
            text.seen.zero_()
            for row, prompt in enumerate(prompts):
                text.seen[row, torch.tensor(prompt, device=text.seen.device)] = True

    def stop_all_but(self, running: Sequence[bool]) -> None:
        """Let the other rows grow no further."""
        if list(running) != self._running:
            self._running = list(running)
            self.text.running.copy_(torch.tensor(self._running))

    def round(self, length: int, generator: torch.Generator | None) -> list[list[int]]:
        """Draft and verify once.

        Args:
            length: K, from 0 to the longest of the decoder's size.
            generator: Source of random numbers; None for greedy decoding.

        Returns:
            The tokens that each row gained: 1 to K + 1, the accepted drafts first; none for rows that were stopped.
        """
        self._draw_uniform(generator)
        if self.has_fixed_shapes:
            gained = self._fixed_round(length)
        else:
            window = 1
            if length:
                assert self.drafter is not None, "a decoder without heads was asked for drafts"
                window = self._catch_up(length, PREFILL_TOKENS)
            gained = self._round(length, window, max(self._newest) + length + 1)
        tokens: list[list[int]] = [[token for token in row if token != NO_TOKEN] for row in gained.tolist()]
        if length:
            assert self.drafter is not None
            self.drafter.mark_final(length, self._newest)
        self._newest = [newest + len(row) for newest, row in zip(self._newest, tokens, strict=True)]
        return tokens

    def backlog(self) -> list[int]:
        """Positions that the heads would first have to catch up on, for each draft length from 0."""
        if self.drafter is None:
            return [0]
        usual = self.drafter.steady_window(self.size.longest)
        lags = self.drafter.lags(self._newest, self._running)
        lags += [lags[-1]] * (self.size.longest - len(lags))
        return [0, *(lag if lag > usual else 0 for lag in lags[: self.size.longest])]

    def _catch_up(self, length: int, window: int) -> int:
        assert self.drafter is not None
        self.drafter.catch_up(length, self._newest, self._running, window)
        return self.drafter.lag(length, self._newest, self._running)

    def _fixed_round(self, length: int) -> Tensor:
        window = 1
        if length:
            assert self.drafter is not None, "a decoder without heads was asked for drafts"
            window = self.drafter.steady_window(self.size.longest)
            self._catch_up(length, window)
        if length in self._rounds:
            return self._rounds[length]()
        # torch counts the graphs of all decoders together and gives up at 8; each is wanted.
        with torch._dynamo.config.patch(recompile_limit=1000):
            self._rounds[length] = self._prepared(length, window)
            return self._rounds[length]()

    def _prepared(self, length: int, window: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return self._round(length, window, self.size.capacity)

        prepared: Callable[[], Tensor] = run
        if self._compiled:
            prepared = torch.compile(run, fullgraph=True, dynamic=False)
        if _captures(self.model):
            return CapturedRound(prepared, self._mutable())
        return prepared

    def _mutable(self) -> list[Tensor]:
        """What a round changes for good: everything else is overwritten before it is read again."""
        text = self.text
        kept = [text.n_known, *self.cache.recurrent_buffers()]
        return kept if text.seen is None else [*kept, text.seen]

    def _draw_uniform(self, generator: torch.Generator | None) -> None:
        if generator is not None:
            self.uniform.copy_(torch.rand(self.uniform.shape, dtype=self.uniform.dtype, generator=generator))

    def _round(self, length: int, window: int, n_keys: int) -> Tensor:
        """One round. ``[B, K + 1]``: the tokens gained, `NO_TOKEN` behind them."""
        text = self.text
        newest = text.newest
        proposal = None
        inputs = text.tokens.gather(1, newest[:, None])
        if length:
            assert self.drafter is not None
            proposal = self.drafter.draft(length, window, n_keys, self.uniform[:, :length])
            inputs = torch.cat([inputs, proposal.tokens], 1)
        positions = newest[:, None] + torch.arange(length + 1, device=newest.device)
        # A plain step advances recurrent states at once; a verified one waits for the verdict.
        n_valid = None if length else text.running.long()
        alone = not length and self.size.n_rows == 1 and not self.has_fixed_shapes
        call = StaticCall(positions, n_keys, n_valid, sees_all=alone)
        h = self.model.decode(inputs, self.cache, call)
        if text.states is not None:
            text.states[self._row_numbers, positions] = h
        logits = self.model.lm_head(h)
        if proposal is None:
            token = self._choose(logits[:, 0])
            verdict = Verdict(torch.zeros_like(token), token)
            drafts = token[:, None][:, :0]
        else:
            verdict = self._judge(logits, proposal)
            drafts = proposal.tokens
        n_gained = torch.where(text.running, verdict.n_accepted + 1, 0)
        if length:
            self.cache.commit(n_gained)
        offsets = torch.arange(length + 1, device=newest.device)
        emitted = torch.cat([drafts, verdict.next_token[:, None]], 1)
        emitted = torch.where(offsets < verdict.n_accepted[:, None], emitted, verdict.next_token[:, None])
        self._append(emitted, n_gained)
        return torch.where(offsets < n_gained[:, None], emitted, NO_TOKEN)

    def _append(self, emitted: Tensor, n_gained: Tensor) -> None:
        """Write tokens ``[B, T]`` behind the text, of which the first `n_gained` count and the others repeat one of them."""
        text = self.text
        offsets = torch.arange(emitted.shape[1], device=emitted.device)
        text.tokens.scatter_(1, text.n_known[:, None] + offsets, emitted)
        text.n_known.add_(n_gained)
        if text.seen is not None:
            text.seen.scatter_(1, emitted, True)

    def _choose(self, logits: Tensor) -> Tensor:
        """The token that follows, from logits ``[B, V]``."""
        if self.sampling.greedy:
            return penalize(logits, self.sampling, self.text.seen).argmax(-1)
        return draw(warp(logits, self.sampling, self.text.seen), self.uniform[:, -1])

    def _judge(self, logits: Tensor, proposal: Proposal) -> Verdict:
        seen = None if self.text.seen is None else seen_along(self.text.seen, proposal.tokens)
        if self.sampling.greedy:
            return accept_greedy(penalize(logits, self.sampling, seen), proposal.tokens)
        n_drafts = proposal.tokens.shape[1]
        law = warp(logits, self.sampling, seen)
        return accept(law, proposal.law, proposal.tokens, self.uniform[:, -1 - n_drafts :])


def _captures(model: Any) -> bool:
    """Whether rounds become CUDA graphs: on a GPU, for models without experts.

    Those of transformers look up which of them were chosen, and wait for the host to know.
    """
    on_gpu: bool = model.lm_head.weight.device.type == "cuda"
    return on_gpu and not getattr(model.config.get_text_config(), "num_experts", 0)


class CapturedRound:
    """A round as a CUDA graph: one launch instead of hundreds.

    Args:
        run: The round, a function of fixed buffers.
        mutable: Buffers that it changes for good. The runs that warm it up and capture it are undone there.
    """

    def __init__(self, run: Callable[[], Tensor], mutable: Sequence[Tensor]) -> None:
        before = [buffer.clone() for buffer in mutable]

        def undo() -> None:
            for buffer, value in zip(mutable, before, strict=True):
                buffer.copy_(value)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
                undo()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run()
        undo()

    def __call__(self) -> Tensor:
        """Run it on what the buffers hold now."""
        self.graph.replay()
        return self.result
