"""The demo's chapter on drafting: the looped model gets heads that draft, and writes the same text with and without them.

Iterations make a token dearer and leave the price of a draft as it is, so this is where drafts should pay. The trunk is frozen:
the text stays that of the looped model. The heads learn from text that the model wrote, since that is what they have to
predict. Ways of decoding take turns on every prompt, and each is compared with plain decoding of the same prompt, because the
speed of a machine drifts.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mull.app.report.figures import acceptance_figure
from mull.app.report.page import Report
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.decoding.generate import GenerationStats, generate
from mull.evaluation.acceptance import acceptance_by_position
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import from_pretrained
from mull.training.loop import TrainConfig, TrainResult
from mull.training.objectives.base import Objective
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

LONGEST = 3
HEADS = MTPConfig(num_predict_tokens=LONGEST, mtp_head_type="sequential", speculation_lookahead=LONGEST)
PROMPT_TOKENS = 64

PLAIN = "plain"
FIXED = f"{LONGEST} drafts"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "1 draft": {"draft": "mtp", "draft_length": 1},
    FIXED: {"draft": "mtp", "draft_length": LONGEST},
    "adaptive": {"draft": "mtp"},
}
"""Name of a way of decoding to its arguments of `generate`. Plain comes first: the others are compared with it."""

Train = Callable[[MullForCausalLM, Objective, ShuffledBatches, TrainConfig, Path], TrainResult]


@dataclass(frozen=True, kw_only=True)
class SpeculationSize:
    """How large the chapter is."""

    own_rows: int = 128
    """Rows of text that the model writes for its heads."""

    own_tokens: int = 160
    """Tokens that it writes in each."""

    steps: int = 40
    """Optimizer steps."""

    batch_size: int = 16
    """Rows of a step."""

    prompts: int = 8
    """Held-out prompts to decode."""

    new_tokens: int = 96
    """Tokens to decode behind each."""


@dataclass(frozen=True, eq=False)
class SpeculationStory:
    """What happened with drafts."""

    iterations: int
    """Think iterations of the trunk, in training and decoding."""

    written: GenerationStats
    """How the text for the heads was written."""

    run: TrainResult
    """Training of the heads."""

    n_parameters: int
    """Of the heads."""

    calls: dict[str, list[GenerationStats]]
    """Statistics by way of decoding, one call per prompt."""

    n_same: dict[str, int]
    """Calls whose tokens were those of plain decoding."""

    sample: Tensor
    """Tokens of one prompt and its continuation."""


def speculation_story(
    checkpoint: Path,
    packed: PackedDataset,
    held_out: PackedDataset,
    train: Train,
    out: Path,
    *,
    size: SpeculationSize,
    seed: int,
) -> SpeculationStory:
    """Train heads on the frozen model, save it with them, and decode held-out prompts in turn in every way.

    Args:
        checkpoint: The looped model, in fp32.
        packed: Training rows, whose beginnings the model continues.
        held_out: Where the prompts come from.
        train: Runs the training loop.
        out: Folder for the metrics; the model goes to its ``model``.
        size: How large it is.
        seed: Of the heads, and of the order of the data.
    """
    torch.manual_seed(seed)
    model = from_pretrained(str(checkpoint), mtp=HEADS)
    heads = model.mtp_heads
    assert heads is not None
    model.requires_grad_(False)
    heads.requires_grad_(True)
    iterations = model.iterations(None)
    own, written = _own_text(model, packed, size)
    sampling = IterationSampling(kind="fixed", maximum=iterations)
    objective = make_objective("baseline-mtp", Resources(model=model, iterations=sampling))
    config = TrainConfig(steps=size.steps, optimizer="muon", muon_lr=0.02, peak_lr=3e-3, log_every=1, seed=seed)
    run = train(model, objective, ShuffledBatches(own, size.batch_size, seed), config, out)
    model.save_pretrained(out / "model")

    prompts = _beginnings(held_out, size.prompts)
    for options in WAYS.values():  # the first call of a process is slower than all others
        generate(model, prompts[:1], max_new_tokens=8, eos_token_id=[], **options)
    calls: dict[str, list[GenerationStats]] = {name: [] for name in WAYS}
    n_same = dict.fromkeys(WAYS, 0)
    sequences: dict[str, Tensor] = {}
    for prompt in prompts.split(1):
        for name, options in WAYS.items():
            output = generate(model, prompt, max_new_tokens=size.new_tokens, eos_token_id=[], **options)
            calls[name].append(output.stats)
            sequences[name] = output.sequences[0]
            n_same[name] += torch.equal(sequences[name], sequences[PLAIN])
    n_parameters = sum(parameter.numel() for parameter in heads.parameters())
    return SpeculationStory(iterations, written, run, n_parameters, calls, n_same, sequences[PLAIN])


def _own_text(
    model: MullForCausalLM, packed: PackedDataset, size: SpeculationSize
) -> tuple[PackedDataset, GenerationStats]:
    """Rows that begin as training text and go on as the model writes, greedily, as it will decode."""
    output = generate(model, _beginnings(packed, size.own_rows), max_new_tokens=size.own_tokens, eos_token_id=[])
    rows = output.sequences
    positions = torch.arange(rows.shape[1]).expand_as(rows).contiguous()
    return PackedDataset(rows, rows, positions), output.stats


def _beginnings(dataset: PackedDataset, n_rows: int) -> Tensor:
    """Beginnings of at most `n_rows` rows ``[n_rows, tokens]``, spread over those in which no document ends so early."""
    width = min(PROMPT_TOKENS, dataset.input_ids.shape[1] // 2)
    positions = dataset.position_ids[:, :width]
    rows = dataset.input_ids[positions[:, -1] - positions[:, 0] == width - 1, :width]
    places = torch.linspace(0, len(rows) - 1, min(n_rows, len(rows))).long()
    return rows[places]


def tell_speculation(report: Report, story: SpeculationStory, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the chapter."""
    n_prompts, new_tokens = len(story.calls[PLAIN]), story.calls[PLAIN][0].new_tokens
    last = story.run.history[-1]
    section = report.section("Drafting")
    head_losses = ", ".join(format(last[f"head{k}_loss"], ".2f") for k in range(1, LONGEST + 1))
    section.prose(
        f"The looped model got {LONGEST} heads, {story.n_parameters:,} parameters together: head k reads the state of the head "
        "before and the k-th token ahead, and drafts the one behind it. With the model itself frozen at "
        f"{story.iterations} iterations, they learnt for {story.run.step} steps ({story.run.seconds:.0f} s) from "
        f"{story.written.new_tokens:,} tokens that the model wrote in "
        f"{story.written.prefill_seconds + story.written.decode_seconds:.0f} s; their last losses are "
        f"{head_losses} nats, next to {last['head0_loss']:.2f} of the model."
    )
    section.prose(
        "`mull.generate` verifies the drafts of a round in a single pass of the model and keeps those that the model would have "
        f"written itself: drafts change the time, not the text. {n_prompts} held-out prompts, {new_tokens} greedy tokens each, "
        "in fp32, with all iterations."
    )
    counts = acceptance_by_position(story.calls[FIXED])
    section.figure(
        acceptance_figure(
            [count.conditional for count in counts],
            [count.cumulative for count in counts],
            {name: [call.tokens_per_second for call in calls] for name, calls in story.calls.items()},
        ),
        f"Left: accepted drafts by position, drafting {LONGEST} in every round. Right: speed of decoding, a point per prompt in "
        "the order of measuring, and the median.",
    )
    section.table(
        ["way", "same tokens", "tokens per round", "tokens per second", "speed-up", "least", "most"],
        [_row(name, story) for name in WAYS],
        caption=(
            "Prompts whose tokens are those of plain decoding; tokens per pass of the model; medians over the prompts. Speed-up "
            "is over plain decoding of the same prompt; a number below 1 is slower."
        ),
    )
    section.table(
        ["way", *(f"{length} drafted" for length in range(LONGEST + 1))],
        [_rounds(name, story) for name in WAYS],
        caption="Rounds by the number of tokens that were drafted. Fixed lengths draft fewer only where a text is about to end.",
    )
    section.table(
        ["position", "drafted", "tested", "accepted", "share of tested", "share of drafted"],
        [[place, *count, count.conditional, count.cumulative] for place, count in enumerate(counts, start=1)],
        caption=f"Drafts by position, {LONGEST} in every round; tested are those whose predecessors were accepted.",
        digits=3,
    )
    section.prose(_verdict(story))
    section.prose("Greedy text of a model this small tends to repeat itself, and what repeats is easy to draft.")
    section.sample("The last prompt and its continuation", str(tokenizer.decode(story.sample)))


def _speedups(name: str, story: SpeculationStory) -> list[float]:
    """Tokens per second over those of plain decoding, by prompt."""
    pairs = zip(story.calls[name], story.calls[PLAIN], strict=True)
    return [call.tokens_per_second / plain.tokens_per_second for call, plain in pairs]


def _row(name: str, story: SpeculationStory) -> list[Any]:
    calls = story.calls[name]
    speedups = _speedups(name, story)
    return [
        name,
        f"{story.n_same[name]} of {len(calls)}",
        1 + sum(sum(call.accepted) for call in calls) / sum(call.row_rounds for call in calls),
        median(call.tokens_per_second for call in calls),
        median(speedups),
        min(speedups),
        max(speedups),
    ]


def _rounds(name: str, story: SpeculationStory) -> list[Any]:
    lengths: Counter[int] = sum((Counter(call.draft_lengths) for call in story.calls[name]), Counter())
    return [name, *(lengths[length] for length in range(LONGEST + 1))]


def _verdict(story: SpeculationStory) -> str:
    """What the numbers say, whichever way they fall."""
    sentences = []
    for name in WAYS:
        if name == PLAIN:
            continue
        speedups = _speedups(name, story)
        change = median(speedups) - 1
        sentences.append(
            f"{name}: {abs(change):.0%} {'faster' if change > 0 else 'slower'} than plain decoding in the median, "
            f"{min(speedups):.2f} to {max(speedups):.2f} times its speed."
        )
    different = sum(len(story.calls[name]) - same for name, same in story.n_same.items())
    if not different:
        return " ".join(["All calls wrote the same tokens.", *sentences])
    warning = f"{different} calls wrote OTHER tokens: in fp32 that takes two tokens whose logits tie to rounding."
    return " ".join([warning, *sentences])
