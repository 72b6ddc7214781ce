"""Generation: one entry for plain and self-speculative decoding, greedy and sampled, of rows of any length.

Speculative decoding drafts with the model's own heads and keeps what the model itself would have written: greedy output is that
of plain decoding, and sampled output has the same distribution (arXiv:2211.17192, appendix A.1; arXiv:2302.01318, theorem 1).
Drafts change how long it takes, not what comes out.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mull.decoding.decoder_cache import DecoderCache, DecoderKey
from mull.decoding.draft_length import DraftLength
from mull.decoding.drafting import Drafter
from mull.decoding.rounds import Compilation, Decoder, RowDraws, Source
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.model.routing import Routed
from mull.ops.sampling import Sampling
from mull.runtime.arguments import (
    require,
    require_callable,
    require_count,
    require_ids,
    require_seed,
    require_tensors,
    shown,
)
from mull.runtime.distributed import gather_objects, global_sum, shares_weights

UNSTEADY_ROPES = {"dynamic", "longrope"}
"""Rotary embeddings of transformers that depend on the largest position of a call."""


@dataclass
class GenerationStats:
    """What a call of `generate` did. Drafts are counted over rounds and the rows that were running in them."""

    prompt_tokens: int
    """Tokens of all prompts, without padding."""

    think_iterations: int | None
    """Passes through the think block, in an adaptive call the most; None for an explicit path."""

    new_tokens: int = 0
    """Tokens of all rows."""

    rounds: int = 0
    """Forward passes after the prompt, with or without drafts."""

    row_rounds: int = 0
    """Rows that were running, summed over the rounds."""

    draft_lengths: dict[int, int] = field(default_factory=dict)
    """Rounds by draft length."""

    think_histogram: dict[int, int] = field(default_factory=dict)
    """Tokens by the think iterations that they took, of an adaptive call: those of the text that ran in rounds. The prompt is not
    counted."""

    readouts: int = 0
    """Passes of the unembedding, token by token, that halting rules took in rounds, on top of those of the predictions."""

    drafted: list[int] = field(default_factory=list)
    """How often a first, second, ... token was drafted."""

    verified: list[int] = field(default_factory=list)
    """Of these, those whose predecessors were all accepted, so that the model was asked about them."""

    accepted: list[int] = field(default_factory=list)
    """Of these, those that were accepted."""

    prefill_seconds: float = 0.0
    """Wall time until the first token of each row."""

    decode_seconds: float = 0.0
    """Wall time of the rounds, without `warm_up_seconds`."""

    warm_up_seconds: float = 0.0
    """Wall time of rounds that were compiled or captured first. `tokens_per_second` and `speedup` leave them out."""

    timed_tokens: list[int] = field(default_factory=list)
    """Tokens that each row gained in `decode_seconds`."""

    plain_seconds: float | None = None
    """Median wall time of a round without drafts. Without one in this call it comes from earlier calls of this size; None if
    there was none either."""

    def __getitem__(self, name: str) -> Any:
        """A field or property by its name."""
        return getattr(self, name)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of accepted drafts by position, of those that were verified."""
        return tuple(a / v if v else 0.0 for a, v in zip(self.accepted, self.verified, strict=True))

    @property
    def mean_accepted_length(self) -> float:
        """Mean tokens per row and round, the model's own included: 1 for plain decoding. Not a speed-up: drafts cost time."""
        return 1 + sum(self.accepted) / self.row_rounds if self.row_rounds else 1.0

    @property
    def mean_think_iterations(self) -> float | None:
        """Mean iterations of the tokens that ran in rounds; None for an explicit path."""
        n_tokens = sum(self.think_histogram.values())
        if not n_tokens:
            return self.think_iterations
        return sum(depth * count for depth, count in self.think_histogram.items()) / n_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second of decoding."""
        return sum(self.timed_tokens) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def speedup(self) -> float | None:
        """Time of plain decoding for the same tokens, at `plain_seconds` a round, over `decode_seconds`.

        None if no plain round was measured: a fixed draft length leaves no room for one.
        """
        if self.plain_seconds is None or not self.decode_seconds:
            return None
        return max(self.timed_tokens) * self.plain_seconds / self.decode_seconds

    def record(self, length: int, gained: Sequence[int], kept: Sequence[int], seconds: float, warm_up: bool) -> None:
        """Add a round.

        Args:
            length: Its draft length.
            gained: Tokens that each row gained; 0 for rows that no longer run.
            kept: How many of them are part of the text, which may have ended inside the round.
            seconds: Its wall time.
            warm_up: The round was compiled or captured in that time.
        """
        running = [n for n in gained if n]
        self.rounds += 1
        self.row_rounds += len(running)
        self.draft_lengths[length] = self.draft_lengths.get(length, 0) + 1
        for counts in (self.drafted, self.verified, self.accepted):
            counts.extend([0] * (length - len(counts)))
        for position in range(length):
            self.drafted[position] += len(running)
            self.verified[position] += sum(n > position for n in running)
            self.accepted[position] += sum(n > position + 1 for n in running)
        if warm_up:
            self.warm_up_seconds += seconds
            return
        self.decode_seconds += seconds
        self.timed_tokens = [n + new for n, new in zip(self.timed_tokens or [0] * len(kept), kept, strict=True)]


@dataclass
class GenerateOutput:
    """What `generate` returns."""

    sequences: Tensor
    """``[B, T + N]``: the prompts as given, then the new tokens, then padding."""

    stats: GenerationStats


class Streamer(Protocol):
    """Takes tokens as they come; the streamers of transformers do."""

    def put(self, value: Tensor) -> None:
        """Take tokens ``[n]``: the prompt first, then those of each round."""

    def end(self) -> None:
        """Called once, after the last token."""


@torch.no_grad()
def generate(
    model: MullForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft: Literal["mtp"] | None = None,
    draft_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    think_iterations: int | None = None,
    path: Sequence[Sequence[int]] | None = None,
    adaptive: bool | HaltingConfig | None = None,
    streamer: Streamer | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    compile: bool | Compilation = False,  # noqa: A002
) -> GenerateOutput:
    """Continue prompts.

    Args:
        model: In evaluation mode.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` with 0 at padding, on either side; None for none.
        max_new_tokens: Tokens per row at most.
        draft: ``"mtp"`` drafts with the model's heads and verifies; None decodes token by token.
        draft_length: Tokens to draft per round. None chooses by measured cost and acceptance, from 0 to
            ``MTPConfig.speculation_lookahead``.
        temperature: See `mull.ops.sampling.Sampling`, as for the next four.
        top_k: Most probable tokens to sample from.
        top_p: Probability mass to sample from.
        min_p: Least probability, relative to that of the most probable token.
        repetition_penalty: Divides the logits of tokens that occurred, except padding.
        seed: Seed of the sampling; None draws one from torch's global generator. A sequence has one for each row. Without drafts,
            the draws of such a row do not depend on the other rows; nor with drafts of a given `draft_length`.
        eos_token_id: Tokens that end a row; None uses the model's own, an empty sequence lets every row reach the limit.
        pad_token_id: Fills rows that ended early; None uses the model's own.
        think_iterations: Passes through the think block; default as in `ETDConfig`.
        path: Explicit visits ``(layer, occurrence)`` instead.
        adaptive: Whether tokens may stop before the last iteration, as in the model's `forward`.
        streamer: Receives tokens as they come; a single row only.
        stop: Given the new tokens of a row, whether the row ends here; asked after each round that added some. A round may add
            several, so the text can go on for some tokens after what made it stop.
        compile: Compile a round, once per size and draft length: seconds to minutes in the first call, less time per token
            later. ``"default"`` (or True) or ``"max"``: on a CPU, each compiled round keeps a copy of the weights, packed for
            kernels that were chosen by time; it takes minutes, and torch's cache on disk keeps the choice. On a GPU, ``"max"``
            chooses kernels by time, too, and rounds are captured as CUDA graphs in any case.

    Returns:
        The rows, and what it took.

    Raises:
        TypeError: an argument of another type.
        ValueError: arguments that do not fit the model or each other.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    prompts = _prompts(model, input_ids, attention_mask, max_new_tokens)
    padding = _padding(model, pad_token_id, len(prompts))
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer is {shown(streamer)}: give an object with put and end, such as TextStreamer.")
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"A streamer takes one row, and input_ids has {len(prompts)}.")
    visits = model.path(think_iterations, path)
    compiled = _compilation(compile)
    halting = _halting(model, adaptive, think_iterations, path)
    routed = _routed(model, path, compiled)
    n_drafts = _max_drafts(model, draft, draft_length)
    key = DecoderKey(visits, len(prompts), n_drafts, model.dtype, compiled, halting, routed)
    kept = DecoderCache.of(model)
    policy = kept.policy(key) if draft_length is None else DraftLength(key.max_drafts, fixed=draft_length)
    if stop is not None:
        require_callable("stop", stop, "a function of a row's new tokens, or leave it out")
    stats = GenerationStats(
        prompt_tokens=sum(map(len, prompts)),
        think_iterations=None if path is not None else model.iterations(think_iterations),
    )
    rows = _Rows(len(prompts), max_new_tokens, _end_tokens(model, eos_token_id), stop)
    shared = _shared_columns(model, prompts, compiled)
    with _plain_mode(model):
        decoder = kept.decoder(model, key, sampling, (shared or max(map(len, prompts))) + max_new_tokens)
        _run(decoder, policy, prompts, rows, _source(sampling, seed, len(prompts)), streamer, stats, shared)
    stats.new_tokens = sum(map(len, rows.tokens))
    return GenerateOutput(_joined(input_ids, rows.tokens, padding), stats)


def _routed(model: MullForCausalLM, path: Sequence[Sequence[int]] | None, compiled: Compilation | None) -> Routed:
    """What decides about layers and experts."""
    etd = model.etd_config
    # Gates of token skipping also scale what the layers of a given path do.
    routed: Routed = "not" if etd is None or (etd.experts is None and etd.token_skip is None) else "experts"
    if path is None and etd is not None and (etd.router is not None or etd.token_skip is not None):
        routed = "routers"
    if routed != "not" and compiled:
        raise ValueError(
            "Layer routers, token skipping and LoRA experts decide on the host, and compile cannot: leave compile out."
        )
    return routed


def _shared_columns(model: MullForCausalLM, prompts: list[list[int]], compiled: Compilation | None) -> int | None:
    """Columns of the longest prompt on any rank that shares the model's weights; None if no rank does."""
    if not shares_weights(model):
        return None
    if compiled:
        raise ValueError("Ranks gather this model's weights layer by layer, and compile cannot: leave compile out.")
    return max(gather_objects(max(map(len, prompts))))


@contextmanager
def _plain_mode(model: MullForCausalLM) -> Iterator[None]:
    """Leave inference mode, whose tensors later calls could not write to, and autocast, whose keys do not fit the buffers."""
    autocast = torch.autocast(model.lm_head.weight.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def _run(
    decoder: Decoder,
    policy: DraftLength,
    prompts: list[list[int]],
    rows: "_Rows",
    generator: Source,
    streamer: Streamer | None,
    stats: GenerationStats,
    shared: int | None,
) -> None:
    """Continue `prompts` in `rows`, which are empty at first, until every row has ended.

    `shared` is given where ranks share the weights. They must run equally many layers, so each reads as many columns of prompts
    as the longest of all has, and goes on until the last row of any has ended.
    """
    begin = time.perf_counter()
    rows.append([[token] for token in decoder.start(prompts, generator, shared)])
    stats.prefill_seconds = time.perf_counter() - begin
    if streamer is not None:
        streamer.put(torch.tensor(prompts[0]))
        streamer.put(torch.tensor(rows.tokens[0]))
    plain: list[float] = []
    while _goes_on(rows, decoder.text.running.device if shared else None):
        decoder.stop_all_but(rows.running)
        left = rows.left
        most = max(left.values(), default=0)
        last = [row for row, n in left.items() if n == most]
        backlog = decoder.backlog()
        chosen = policy.choose(list(left.values()), backlog) if left else 0
        # Prepared rounds keep their shapes, and rows with seeds of their own must not depend on how long others go on. All other
        # rounds need not draft more than the text can gain.
        fixed = bool(decoder.preparation) or isinstance(generator, RowDraws)
        length = chosen if fixed or not left else min(chosen, most - 1)
        warm_up = not decoder.is_ready(length)
        begin = time.perf_counter()
        gained = decoder.round(length, generator)
        seconds = time.perf_counter() - begin
        kept = rows.append(gained)
        counts = [len(tokens) for tokens in gained]
        if last and not warm_up:
            # Rows differ in how many drafts they accept, and the one with the most left decides when the call ends.
            policy.observe(length, [counts[row] - 1 for row in last], seconds, backlog[length])
        stats.record(length, counts, kept, seconds, warm_up)
        of_text = (row[:n] for row, n in zip(decoder.depths, kept, strict=False))
        for depth, count in Counter(depth for row in of_text for depth in row).items():
            stats.think_histogram[depth] = stats.think_histogram.get(depth, 0) + count
        stats.readouts += decoder.readouts
        if chosen == 0 and not warm_up:
            plain.append(seconds)
        if streamer is not None and kept[0]:
            streamer.put(torch.tensor(rows.tokens[0][-kept[0] :]))
    stats.plain_seconds = median(plain) if plain else policy.seconds.get(0)
    if streamer is not None:
        streamer.end()


def _goes_on(rows: "_Rows", shared: torch.device | None) -> bool:
    """Whether a row runs, here or on a rank that shares the weights; `shared` is the device of these."""
    running = any(rows.running)
    return running if shared is None else bool(global_sum(torch.tensor(int(running), device=shared)))


class _Rows:
    """The new tokens of each row, cut at its end."""

    def __init__(
        self,
        n_rows: int,
        max_new_tokens: int,
        end_tokens: frozenset[int],
        stop: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.running = [True] * n_rows
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self.stop = stop

    @property
    def left(self) -> dict[int, int]:
        """Tokens that each running row may still gain."""
        return {row: self.max_new_tokens - len(self.tokens[row]) for row, runs in enumerate(self.running) if runs}

    def append(self, gained: Sequence[Sequence[int]]) -> list[int]:
        """Add the tokens of a round, up to an end token or the limit inside it; return how many each row kept."""
        counts = []
        for row, new in enumerate(gained):
            if not new:
                counts.append(0)
                continue
            kept = list(new[: self.max_new_tokens - len(self.tokens[row])])
            ends = [place for place, token in enumerate(kept) if token in self.end_tokens]
            kept = kept[: ends[0] + 1] if ends else kept
            self.tokens[row] += kept
            self.running[row] = self.running[row] and not ends and len(self.tokens[row]) < self.max_new_tokens
            if self.stop is not None and self.running[row] and kept:
                self.running[row] = not self.stop(self.tokens[row])
            counts.append(len(kept))
        return counts


def _prompts(
    model: MullForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of each row, without padding."""
    require("model", model, MullForCausalLM, "a model of mull.from_pretrained or wrap_transformer_with_etd")
    model.require_in_memory()
    require_ids("input_ids", input_ids)
    require_tensors(attention_mask=attention_mask)
    require("max_new_tokens", max_new_tokens, int, "a whole number")
    if model.training:
        raise ValueError("The model is in training mode, where dropout changes its output: call model.eval() first.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has {tuple(input_ids.shape)}."
        )
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is not None:
        masks = attention_mask.tolist()
        rows = [[token for token, real in zip(*row, strict=True) if real] for row in zip(rows, masks, strict=True)]
    if not rows or not all(rows):
        raise ValueError(
            "Every row needs at least one token to continue, and at least one row is empty or all padding."
        )
    config = model.config.get_text_config()
    ropes = [config.rope_parameters, *config.rope_parameters.values()] if config.rope_parameters else []
    unsteady = {rope["rope_type"] for rope in ropes if isinstance(rope, dict) and "rope_type" in rope} & UNSTEADY_ROPES
    if unsteady:
        raise ValueError(
            f"The model's rotary embeddings are {unsteady.pop()!r}. They change with the longest row, drafts included, so the "
            "text of a row would depend on the others. Use model.generate."
        )
    vocabulary = config.vocab_size
    if max(map(max, rows)) >= vocabulary or min(map(min, rows)) < 0:
        raise ValueError(f"input_ids has tokens outside 0 to {vocabulary - 1}: the tokenizer belongs to another model.")
    n_tokens, limit = max(map(len, rows)), config.max_position_embeddings
    if n_tokens + max_new_tokens > limit:
        raise ValueError(
            f"The longest prompt's {n_tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions: "
            "shorten one."
        )
    return rows


def _halting(
    model: MullForCausalLM,
    adaptive: bool | HaltingConfig | None,
    think_iterations: int | None,
    path: Sequence[Sequence[int]] | None,
) -> tuple[HaltingConfig, int] | None:
    """When tokens stop, and after how many iterations at the latest; None where all of them run everything."""
    if path is not None and adaptive:
        raise ValueError("adaptive decides which tokens run, and so does a path: give one of them.")
    policy = None if path is not None else model.model.halting(adaptive, think_iterations)
    return None if policy is None else (policy.config, policy.iterations)


def _compilation(given: bool | str) -> Compilation | None:
    if given is False:
        return None
    if given is True or given == "default":
        return "default"
    if given == "max":
        return "max"
    raise ValueError(f"compile={given!r} is not known. Use 'default', 'max', True or False.")


def _max_drafts(model: MullForCausalLM, draft: str | None, draft_length: int | None) -> int:
    """Most drafts of a round; 0 without drafting."""
    if draft is None:
        if draft_length is not None:
            raise ValueError(f"draft_length={draft_length} needs draft='mtp' (--draft mtp).")
        return 0
    if draft != "mtp":
        raise ValueError(f"draft={draft!r} is not known. Use 'mtp' for the model's own heads, or None.")
    if model.mtp_config is None:
        raise ValueError(
            "draft='mtp' (--draft mtp) needs extra heads, and this model has none. Leave it out, load the heads of a Qwen3-Next "
            "or Qwen3.5 checkpoint with --mtp native (mtp=MTPConfig(mtp_head_type='native')), or train some with mull train "
            "(model.mtp and train.algo=baseline-mtp in a recipe)."
        )
    usual = Drafter.max_drafts(model.mtp_config)
    if draft_length is None:
        return usual
    require("draft_length", draft_length, int, "a whole number, or leave it out")
    if draft_length < 0:
        raise ValueError(f"draft_length={draft_length} must be at least 0, which is plain decoding.")
    possible = Drafter.max_drafts(model.mtp_config, draft_length)
    if draft_length > possible:
        raise ValueError(
            f"draft_length={draft_length} is not possible: the model's heads draft {possible} tokens at most."
        )
    # Shorter drafts run on the buffers, and the compiled rounds, of the usual ones.
    return max(usual, draft_length)


def _end_tokens(model: MullForCausalLM, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        return frozenset()
    if not isinstance(eos_token_id, int):
        require("eos_token_id", eos_token_id, (list, tuple, set, frozenset), "a token number, or a list of them")
    tokens = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    for token in tokens:
        require_count("eos_token_id", token, -1)  # some checkpoints say -1 for none
    return tokens


def _padding(model: MullForCausalLM, pad_token_id: int | None, n_rows: int) -> int:
    if pad_token_id is not None:
        require_count("pad_token_id", pad_token_id, 0, model.config.get_text_config().vocab_size - 1)
    for candidate in (pad_token_id, model.generation_config.pad_token_id, model.config.pad_token_id):
        if candidate is not None:
            return int(candidate)
    if n_rows > 1:
        raise ValueError("Rows may end early, and the model has no padding token: give pad_token_id.")
    return 0


def _source(sampling: Sampling, seed: int | Sequence[int] | None, n_rows: int) -> Source:
    """Generators on the CPU, so that a seed gives the same draws on every device; None for greedy decoding."""
    if isinstance(seed, list | tuple):
        if len(seed) != n_rows:
            raise ValueError(f"seed has {len(seed)} numbers for {n_rows} rows: give one for each row, or a single one.")
        for number in seed:
            require_seed("seed", number)
        return None if sampling.greedy else RowDraws(seed)
    if seed is not None:
        require_seed("seed", seed)
    if sampling.greedy:
        return None
    chosen = seed if isinstance(seed, int) else int(torch.randint(2**62, ()))
    return torch.Generator().manual_seed(chosen)


def _joined(input_ids: Tensor, new: list[list[int]], padding: int) -> Tensor:
    width = max(map(len, new))
    rows = torch.tensor([[*row, *[padding] * (width - len(row))] for row in new])
    return torch.cat([input_ids, rows.to(input_ids.device)], 1)
