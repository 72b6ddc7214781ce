"""Rounds of decoding on static buffers: draft, verify in one pass, accept, and commit what was accepted.

A round waits for the device once, at its end. Everything before that is one function of the buffers. In prepared rounds its
shapes depend on the draft length alone, so it can be compiled, and captured as a CUDA graph.

Shapes: B rows, T tokens, D model width, V vocabulary, K drafts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mull.decoding.drafting import Drafter, Proposal, Text
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.model.halting import Halting
from mull.model.path import Path, Visit
from mull.model.policy import GivenTokens
from mull.model.routing import Routed
from mull.ops.sampling import Sampling, Verdict, accept, accept_greedy, draw, penalize, seen_along, warp
from mull.runtime.distributed import shares_weights
from mull.runtime.progress import Progress

PREFILL_TOKENS = 2048
"""Prompt tokens per row in one pass, which bounds the memory of its mask."""

NO_TOKEN = -1
"""Follows the last token that a row gained in a round."""


@dataclass(frozen=True)
class Size:
    """Size of a decoder's buffers."""

    n_rows: int
    capacity: int
    """Tokens per row: prompt, new ones and the drafts of a round."""

    max_drafts: int
    """Most drafts of a round; 0 for a decoder that never drafts."""

    @staticmethod
    def slack(max_drafts: int) -> int:
        """Slots after a row's last token that a round may write to: its drafts, or a window that is longer than the row."""
        return 3 * max_drafts + 2


Compilation = Literal["default", "max"]
"""How hard ``torch.compile`` tries; see `generate`."""

PACKING = {
    "freezing": True,
    "cpp.weight_prepack": False,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}
"""Settings of inductor on a CPU for ``max``: weights become constants, which its kernels store in the order in which they read
them, and the kernels of each product are chosen by time."""

SECONDS_PER_VISIT: dict[Compilation, float] = {"default": 2.0, "max": 7.0}
"""Time to compile one visit of a layer, without torch's cache on disk: SmolLM2-135M in bf16 on two CPU cores."""


class RowDraws:
    """Random numbers of rows that have seeds of their own.

    Args:
        seeds: One for each row.
    """

    BLOCK = 32
    """Rounds that a row draws for at once: a call for each row and round would cost as much as a small model."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._rounds: list[Tensor] = []

    def next(self, width: int, dtype: torch.dtype) -> Tensor:
        """``[B, width]``: those of the next round."""
        if not self._rounds:
            drawn = [torch.rand(self.BLOCK, width, dtype=dtype, generator=each) for each in self._generators]
            self._rounds = [*torch.stack(drawn, 1).flip(0).unbind(0)]
        return self._rounds.pop()


Source = torch.Generator | RowDraws | None
"""Where a call's random numbers come from."""


@dataclass(frozen=True)
class Preparation:
    """What is done to a round before it first runs with a draft length. False if rounds run as they are.

    Prepared rounds have fixed shapes: they read the whole capacity, and a window of the largest size.
    """

    compiled: Compilation | None
    captured: bool

    @classmethod
    def of(cls, model: MullForCausalLM, compiled: Compilation | None, adaptive: bool = False) -> "Preparation":
        """On a GPU, rounds are captured as CUDA graphs.

        Not so for experts: those of transformers look up which of them were chosen, and wait for the host to know. Nor for
        adaptive decoding, where the host decides which layers run, nor for weights that ranks gather layer by layer.
        """
        on_gpu = model.lm_head.weight.device.type == "cuda"
        has_experts = bool(getattr(model.config.get_text_config(), "num_experts", 0))
        return cls(compiled, captured=on_gpu and not has_experts and not adaptive and not shares_weights(model))

    def __bool__(self) -> bool:
        """Whether anything is done."""
        return self.compiled is not None or self.captured


class Decoder:
    """Decodes the rows of one batch at a time.

    Args:
        model: In evaluation mode.
        path: The visits of every pass.
        sampling: How tokens are chosen.
        size: Rows and tokens.
        halting: When tokens stop thinking, and the most iterations; None if all visits run.
        routed: What decides about layers and experts.
        compiled: Run rounds through ``torch.compile``; None runs them as they are.
    """

    def __init__(
        self,
        model: MullForCausalLM,
        path: Path,
        sampling: Sampling,
        size: Size,
        compiled: Compilation | None = None,
        halting: tuple[HaltingConfig, int] | None = None,
        routed: Routed = "not",
    ) -> None:
        weight = model.lm_head.weight
        device = weight.device
        self.model = model
        self.sampling = sampling
        self.size = size
        self.halting = halting
        self.routed = routed
        self.depths: list[list[int]] = []
        """Iterations that the newest tokens of each row took in the latest round, of an adaptive decoder."""
        self.readouts = 0
        """Tokens that the latest round decoded early."""
        heads = model.mtp_heads if size.max_drafts else None
        n_blocks = 0 if heads is None or heads.pointwise else len(heads.heads)
        self.cache = StaticSlotCache(
            model.config.get_text_config(),
            path,
            size.n_rows,
            size.capacity,
            dtype=weight.dtype,
            device=device,
            n_head_blocks=n_blocks,
            shares=model.model.stop_of(None if halting is None else halting[0]) == "share_first",
        )
        self.text = Text(
            tokens=torch.zeros(size.n_rows, size.capacity, dtype=torch.long, device=device),
            n_known=torch.ones(size.n_rows, dtype=torch.long, device=device),
            running=torch.ones(size.n_rows, dtype=torch.bool, device=device),
            states=None if heads is None else weight.new_zeros(size.n_rows, size.capacity, weight.shape[1]),
            seen=weight.new_zeros(size.n_rows, weight.shape[0], dtype=torch.bool) if sampling.needs_seen else None,
        )
        self._drafter = None if heads is None else Drafter(model, self.cache, self.text, sampling)
        self.uniform = torch.zeros(size.n_rows, 2 * size.max_drafts + 1, dtype=torch.float64, device=device)
        """Random numbers of a round: K for drawing drafts, then K for accepting them and one for the last token."""
        self._row_numbers = torch.arange(size.n_rows, device=device)[:, None]
        self._newest: list[int] = []
        self._running: list[bool] = []
        self.preparation = Preparation.of(model, compiled, halting is not None or routed != "not")
        if halting is not None and self.preparation:
            self.cache.prepare_stops(halting[0].stop)
        self._prepared: dict[int, Callable[[], Tensor]] = {}

    @property
    def drafter(self) -> Drafter:
        """What proposes the drafts."""
        assert self._drafter is not None, "a decoder without heads was asked for drafts"
        return self._drafter

    def is_ready(self, length: int) -> bool:
        """Whether the next round with this draft length runs at once, and need not be prepared."""
        return not self.preparation or length in self._prepared

    def start(self, prompts: Sequence[Sequence[int]], generator: Source, longest: int | None = None) -> list[int]:
        """Read the prompts, and choose the first token of each row.

        Args:
            prompts: Tokens of each row, at least one.
            generator: Source of random numbers, one of all rows or one for each; None for greedy decoding.
            longest: Columns to read, at least those of the longest prompt; None for these.
        """
        self._load(prompts)
        device = self.text.tokens.device
        lengths = self.text.n_known.clone()
        h_last = self.model.lm_head.weight.new_zeros(len(prompts), self.model.lm_head.weight.shape[1])
        n_columns = longest or max(map(len, prompts))
        most = n_columns if self.routed != "not" else PREFILL_TOKENS  # routers decide on the whole prompt
        for first in range(0, n_columns, most):
            width = min(most, n_columns - first)
            positions = (first + torch.arange(width, device=device)).expand(len(prompts), -1)
            n_valid = (lengths - first).clamp(0, width)
            call = StaticCall(positions, first + width, n_valid, fresh=first == 0)
            policy = self._policy(torch.arange(width, device=device) < n_valid[:, None])
            new = self.text.tokens[:, first : first + width]
            h = self.model.model.decode(new, self.cache, call, policy, routed=self.routed)
            if self.text.states is not None:
                self.text.states[:, first : first + width] = h
            ends_here = (lengths > first) & (lengths <= first + width)
            index = (lengths - 1 - first).clamp(0, width - 1)
            last = h.gather(1, index[:, None, None].expand(-1, 1, h.shape[-1]))[:, 0]
            h_last = torch.where(ends_here[:, None], last, h_last)
        self._draw_uniform(generator)
        token = self._choose(self.model.lm_head(h_last))
        self._append(token[:, None], torch.ones_like(lengths))
        if self._drafter is not None:
            self._drafter.reset()
        self._newest = [len(prompt) for prompt in prompts]
        self._running = [True] * len(prompts)
        return token.tolist()

    def _load(self, prompts: Sequence[Sequence[int]]) -> None:
        self.cache.reset()
        text = self.text
        width = max(map(len, prompts))
        rows = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        text.tokens[:, :width] = rows.to(text.tokens.device)
        text.n_known.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        text.running.fill_(True)
        if text.seen is not None:
            text.seen.zero_()
            for row, prompt in enumerate(prompts):
                text.seen[row, torch.tensor(prompt, device=text.seen.device)] = True

    def stop_all_but(self, running: Sequence[bool]) -> None:
        """Rows that are not `running` grow no further."""
        if list(running) != self._running:
            self._running = list(running)
            self.text.running.copy_(torch.tensor(self._running))

    def round(self, length: int, generator: Source) -> list[list[int]]:
        """Draft and verify once.

        Args:
            length: K, from 0 to the `max_drafts` of the decoder's size.
            generator: Source of random numbers, one of all rows or one for each; None for greedy decoding.

        Returns:
            The tokens that each row gained: 1 to K + 1, accepted drafts first; none for rows that were stopped.
        """
        self._draw_uniform(generator)
        if self.preparation:
            gained = self._prepared_round(length)
        else:
            window = self._catch_up(length, PREFILL_TOKENS)
            gained = self._round(length, window, max(self._newest) + length + 1)
        tokens: list[list[int]] = [[token for token in row if token != NO_TOKEN] for row in gained.tolist()]
        if length:
            self.drafter.progress.mark(length, self._newest)
        self._newest = [newest + len(row) for newest, row in zip(self._newest, tokens, strict=True)]
        return tokens

    def backlog(self) -> list[int]:
        """Positions that idle heads would first have to catch up on, for each draft length from 0."""
        if self._drafter is None:
            return [0]
        progress = self._drafter.progress
        usual = progress.usual(self.size.max_drafts)
        missing = [progress.missing(k, self._newest, self._running) for k in range(1, 1 + self.size.max_drafts)]
        return [0, *(positions if positions > usual else 0 for positions in missing)]

    def _catch_up(self, length: int, window: int) -> int:
        """Let the heads catch up until at most `window` positions are missing; return how many are."""
        if not length:
            return 1
        self.drafter.catch_up(length, self._newest, self._running, window)
        return self.drafter.progress.missing(length, self._newest, self._running)

    def _prepared_round(self, length: int) -> Tensor:
        window = self.drafter.progress.usual(self.size.max_drafts) if length else 1
        self._catch_up(length, window)
        if length in self._prepared:
            return self._prepared[length]()
        compiled = self.preparation.compiled
        settings: dict[str, Any] = {}
        if compiled is not None:
            Progress(None, "round").say(
                f"Compiling a round with {length} drafts (compile={compiled!r}): up to about "
                f"{SECONDS_PER_VISIT[compiled] * len(self.cache.path):.0f} s, less where torch's cache on disk has a part of it."
            )
        if compiled == "max":
            on_cpu = self.text.tokens.device.type == "cpu"
            settings = PACKING if on_cpu else {"max_autotune": True}
        # torch counts the graphs of all decoders together and gives up at 8; each is wanted.
        with torch._dynamo.config.patch(recompile_limit=1000), torch._inductor.config.patch(settings):
            self._prepared[length] = self._prepare(length, window)
            return self._prepared[length]()

    def _prepare(self, length: int, window: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return self._round(length, window, self.size.capacity)

        if self.halting is not None:
            return AdaptiveRound(self, length, window)
        prepared: Callable[[], Tensor] = run
        if self.preparation.compiled is not None:
            prepared = torch.compile(run, fullgraph=True, dynamic=False)
        return CapturedRound(prepared, self.mutable()) if self.preparation.captured else prepared

    def mutable(self) -> list[Tensor]:
        """Buffers whose change outlives a round: all others are overwritten before they are read again."""
        text = self.text
        kept = [text.n_known, *self.cache.recurrent_buffers()]
        return kept if text.seen is None else [*kept, text.seen]

    def _draw_uniform(self, source: Source) -> None:
        if isinstance(source, torch.Generator):
            self.uniform.copy_(torch.rand(self.uniform.shape, dtype=self.uniform.dtype, generator=source))
        elif source is not None:
            self.uniform.copy_(source.next(self.uniform.shape[1], self.uniform.dtype))

    def _round(self, length: int, window: int, n_keys: int) -> Tensor:
        """One round. ``[B, K + 1]``: the tokens gained, then `NO_TOKEN`."""
        proposal = self.propose(length, window, n_keys)
        call, policy = self.call(length, n_keys), self.round_policy(length)
        h = self.model.model.decode(self.inputs(proposal), self.cache, call, policy, routed=self.routed)
        gained = self.conclude(h, call, proposal)
        if length:
            self.cache.commit(self.n_gained(gained))
        if policy is not None:
            self.note_depths(policy, gained)
        return gained

    def propose(self, length: int, window: int, n_keys: int) -> Proposal | None:
        """The drafts of a round; None for none."""
        return self.drafter.draft(length, window, n_keys, self.uniform[:, :length]) if length else None

    def inputs(self, proposal: Proposal | None) -> Tensor:
        """``[B, K + 1]``: each row's newest token, and its drafts."""
        newest = self.text.tokens.gather(1, self.text.newest[:, None])
        return newest if proposal is None else torch.cat([newest, proposal.tokens], 1)

    def call(self, length: int, n_keys: int) -> StaticCall:
        """Where the inputs of a round are in the cache."""
        newest = self.text.newest
        positions = newest[:, None] + torch.arange(length + 1, device=newest.device)
        # A plain step advances recurrent states at once; a verified one waits for the verdict.
        n_valid = None if length else self.text.running.long()
        alone = not length and self.size.n_rows == 1 and not self.preparation
        return StaticCall(positions, n_keys, n_valid, sees_all=alone)

    def conclude(self, h: Tensor, call: StaticCall, proposal: Proposal | None) -> Tensor:
        """Judge the drafts by the final-normed states ``[B, K + 1, D]``, and append the tokens gained."""
        text = self.text
        if text.states is not None:
            text.states[self._row_numbers, call.positions] = h
        logits = self.model.lm_head(h)
        if proposal is None:
            token = self._choose(logits[:, 0])
            verdict = Verdict(torch.zeros_like(token), token)
        else:
            verdict = self._judge(logits, proposal)
        n_gained = torch.where(text.running, verdict.n_accepted + 1, 0)
        emitted = verdict.next_token[:, None]
        if proposal is not None:
            emitted = torch.cat([proposal.tokens, emitted], 1)
        offsets = torch.arange(emitted.shape[1], device=emitted.device)
        emitted = torch.where(offsets < verdict.n_accepted[:, None], emitted, verdict.next_token[:, None])
        self._append(emitted, n_gained)
        return torch.where(offsets < n_gained[:, None], emitted, NO_TOKEN)

    @staticmethod
    def n_gained(gained: Tensor) -> Tensor:
        """``[B]``: how many tokens a round gave."""
        return (gained != NO_TOKEN).sum(1)

    def note_depths(self, policy: Halting, gained: Tensor) -> None:
        """Remember how many iterations the tokens took that a round kept, and what deciding took."""
        assert policy.depth is not None, "noted after the pass"
        self.readouts = policy.n_readouts
        n_gained = self.n_gained(gained).tolist()
        self.depths = [row[:n] for row, n in zip(policy.depth.tolist(), n_gained, strict=True)]

    def round_policy(self, length: int) -> Halting | None:
        """The policy of a round."""
        return self._policy(self.text.running[:, None].expand(-1, length + 1))

    def _policy(self, tokens: Tensor) -> Halting | None:
        """The policy of a pass over tokens; `tokens` ``[B, T]`` is False for those that do not count."""
        if self.halting is None:
            return None
        config, iterations = self.halting
        return self.model.model.halting(config, iterations, tokens, self.model.lm_head)

    def _append(self, emitted: Tensor, n_gained: Tensor) -> None:
        """Write tokens ``[B, T]`` after the text. The first `n_gained` count; the others repeat one of them."""
        text = self.text
        offsets = torch.arange(emitted.shape[1], device=emitted.device)
        text.tokens.scatter_(1, text.n_known[:, None] + offsets, emitted)
        text.n_known.add_(n_gained)
        if text.seen is not None:
            text.seen.scatter_(1, emitted, True)

    def _choose(self, logits: Tensor) -> Tensor:
        """The next token, from logits ``[B, V]``."""
        if self.sampling.greedy:
            return penalize(logits, self.sampling, self.text.seen).argmax(-1)
        return draw(warp(logits, self.sampling, self.text.seen), self.uniform[:, -1])

    def _judge(self, logits: Tensor, proposal: Proposal) -> Verdict:
        seen = None if self.text.seen is None else seen_along(self.text.seen, proposal.tokens)
        if self.sampling.greedy:
            return accept_greedy(penalize(logits, self.sampling, seen), proposal.tokens)
        n_drafts = proposal.tokens.shape[1]
        target = warp(logits, self.sampling, seen)
        return accept(target, proposal.distribution, proposal.tokens, self.uniform[:, -1 - n_drafts :])


class AdaptiveRound:
    """A compiled round of an adaptive decoder. What runs between two decisions is compiled, and the decisions are not.

    Shapes do not depend on who thinks: while a token does, an iteration computes all tokens of the batch, and keeps the others as
    they were.

    Args:
        decoder: The decoder.
        length: Drafts of the round.
        window: Positions that the heads catch up on.
    """

    def __init__(self, decoder: Decoder, length: int, window: int) -> None:
        self._decoder = decoder
        self._length = length
        self._window = window
        assert decoder.halting is not None, "an adaptive decoder"
        etd = decoder.model.model.etd_config
        assert etd is not None, "an adaptive decoder has a think block"
        self._encoder, self._iterations, self._rest = etd.sections(decoder.halting[1])
        self._think_layers = etd.think_layers
        self._begin, self._conclude = _compiled(self._first_part), _compiled(self._last_part)
        self._think = [_compiled(self._part, part) for part in self._iterations]
        self._pass_over = [_compiled(self._nobody, part) for part in self._iterations]
        waits = length > 0 and bool(decoder.cache.recurrent_buffers())
        self._commit = [_compiled(self._keep, part) for part in self._iterations] if waits else []
        with undone(decoder.mutable()):
            self._run_every_part()

    def _run_every_part(self) -> None:
        """Compile now, and not when a token first takes this way."""
        proposal, h = self._begin()
        everybody = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        for number, _ in enumerate(self._iterations):
            if number:  # all tokens run the first iteration
                self._pass_over[number](h)
            h = self._think[number](everybody if number else True, h)
        self._finish(h, proposal, len(self._iterations))

    def __call__(self) -> Tensor:
        """Run it on the present content of the buffers."""
        decoder = self._decoder
        policy = decoder.round_policy(self._length)
        assert policy is not None, "an adaptive decoder"
        proposal, h = self._begin()
        n_run = 0
        for number, _ in enumerate(self._iterations):
            running = policy.active(Visit(self._think_layers.start, number), h)
            if running is False:
                self._pass_over[number](h)
                continue
            if number:  # compiled for a mask, and for one layout of it
                everybody = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
                running = everybody & running
            h, n_run = self._think[number](running, h), number + 1
        gained = self._finish(h, proposal, n_run)
        decoder.note_depths(policy, gained)
        return gained

    def _finish(self, h: Tensor, proposal: Proposal | None, n_run: int) -> Tensor:
        gained: Tensor = self._conclude(h, proposal)
        for commit in self._commit[:n_run]:
            commit(gained)
        return gained

    def _first_part(self) -> tuple[Proposal | None, Tensor]:
        """Drafts, and the states that enter the think block."""
        decoder = self._decoder
        proposal = decoder.propose(self._length, self._window, decoder.size.capacity)
        h = decoder.model.model.embed_tokens(decoder.inputs(proposal))
        return proposal, self._part(self._encoder, True, h)

    def _nobody(self, part: slice, h: Tensor) -> None:
        self._part(part, False, h)

    def _keep(self, part: slice, gained: Tensor) -> None:
        self._decoder.cache.commit(self._decoder.n_gained(gained), part)

    def _last_part(self, h: Tensor, proposal: Proposal | None) -> Tensor:
        decoder = self._decoder
        h = decoder.model.model.norm(self._part(self._rest, True, h))
        call = decoder.call(self._length, decoder.size.capacity)
        gained = decoder.conclude(h, call, proposal)
        if self._length:
            self._keep(self._encoder, gained)
            self._keep(self._rest, gained)
        return gained

    def _part(self, part: slice, running: Tensor | bool, h: Tensor) -> Tensor:
        decoder = self._decoder
        assert decoder.halting is not None, "an adaptive decoder"
        visits = decoder.cache.path[part]
        policy = GivenTokens(dict.fromkeys(visits, running), decoder.halting[0].stop)
        call = decoder.call(self._length, decoder.size.capacity)
        return decoder.model.model.decode_part(h, decoder.cache, call, part, policy)


def _compiled(part: Callable[..., Any], *fixed: slice) -> Callable[..., Any]:
    """A part of a round with its first arguments, as one graph."""

    def run(*values: Any) -> Any:
        return part(*fixed, *values)

    return torch.compile(run, fullgraph=True, dynamic=False)


@contextmanager
def undone(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Undo what happens to these buffers meanwhile."""
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


class CapturedRound:
    """A round as a CUDA graph: one launch instead of hundreds.

    Args:
        run: The round, a function of fixed buffers.
        mutable: Buffers whose change outlives a round. What the runs for warm-up and capture do to them is undone.
    """

    def __init__(self, run: Callable[[], Tensor], mutable: Sequence[Tensor]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                with undone(mutable):
                    run()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with undone(mutable), torch.cuda.graph(self.graph):
            self.result = run()

    def __call__(self) -> Tensor:
        """Run it on the present content of the buffers."""
        self.graph.replay()
        return self.result
