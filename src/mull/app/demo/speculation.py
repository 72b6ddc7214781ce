"""The demo's chapter on drafting: the looped model gets heads that draft, and writes the same text with and without them.

Iterations make a token more expensive but not a draft, so this is where drafts should pay. The trunk is frozen, so the text stays
that of the looped model. The heads learn from text that the model wrote, because that is what they have to predict. The ways of
decoding alternate on every prompt, and each is compared with plain decoding of the same prompt, because the speed of a machine
drifts.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor

from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.app.report.figures import acceptance_figure
from mull.app.report.page import Report
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.decoding.generate import GenerationStats, generate
from mull.evaluation.acceptance import acceptance_by_position
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import from_pretrained
from mull.training.loop import TrainResult
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
"""Name of a way of decoding to its arguments of `generate`. Plain comes first because the others are compared with it."""


@dataclass(frozen=True, eq=False)
class Speculation:
    """Heads trained on the looped model's own text, and what decoding with them took."""

    iterations: int
    """Think iterations of the trunk, in training and decoding."""

    written: GenerationStats
    """How the text for the heads was written."""

    run: TrainResult
    n_parameters: int
    """Of the heads."""

    calls: dict[str, list[GenerationStats]]
    """Statistics by way of decoding, one call per prompt."""

    n_same: dict[str, int]
    """Calls whose tokens were those of plain decoding."""

    sample: str
    """One prompt and its continuation."""

    @classmethod
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Train heads on the frozen model, save it with them, and decode held-out prompts in every way in turn."""
        size = bench.size
        print(
            f"drafting: {size.own_rows} rows of the looped model's own text, {size.drafting_steps} steps for its heads"
        )
        torch.manual_seed(bench.seed)
        model = from_pretrained(str(bench.out / "model"), mtp=HEADS)
        heads = model.mtp_heads
        assert heads is not None
        model.requires_grad_(False)
        heads.requires_grad_(True)
        iterations = model.iterations(None)
        # Greedy, as the model will decode.
        prompts = _beginnings(loops.text.train, size.own_rows)
        output = generate(model, prompts, max_new_tokens=size.own_tokens, eos_token_id=[])
        own = output.sequences
        dataset = PackedDataset(own, own, torch.arange(own.shape[1]).expand_as(own).contiguous())
        fixed = IterationSampling(kind="fixed", maximum=iterations)
        objective = make_objective("baseline-mtp", Resources(model=model, iterations=fixed))
        batches = ShuffledBatches(dataset, size.batch_size, bench.seed)
        run = bench.train("drafting", model, objective, batches, steps=size.drafting_steps, muon_lr=0.02, peak_lr=3e-3)
        model.save_pretrained(bench.out / "drafting" / "model")
        loops.text.tokenizer.save_pretrained(bench.out / "drafting" / "model")

        calls, n_same, last = _decode_in_turn(
            model, _beginnings(loops.text.held_out, size.drafting_prompts), size.drafting_tokens
        )
        n_parameters = sum(parameter.numel() for parameter in heads.parameters())
        sample = str(loops.text.tokenizer.decode(last))
        return cls(iterations, output.stats, run, n_parameters, calls, n_same, sample)

    def tell(self, report: Report) -> None:
        """Heads, acceptance, and speed."""
        plain, last = self.calls[PLAIN], self.run.history[-1]
        head_losses = ", ".join(format(last[f"head{k}_loss"], ".2f") for k in range(1, LONGEST + 1))
        written = self.written.prefill_seconds + self.written.decode_seconds
        section = report.section("Drafting")
        section.prose(f"""
            The looped model got {LONGEST} heads with {self.n_parameters:,} parameters together. Head k reads the state of the
            previous head and the k-th token ahead, and drafts the one after it. The model itself was frozen at
            {self.iterations} iterations. The heads trained for {self.run.step} steps ({self.run.seconds:.0f} s) on
            {self.written.new_tokens:,} tokens that the model wrote in {written:.0f} s. Their last losses are {head_losses} nats;
            the model's is {last["head0_loss"]:.2f}.

            `mull.generate` verifies the drafts of a round in a single pass of the model and keeps those that the model would
            have written itself, so drafts change the time and not the text. {len(plain)} held-out prompts,
            {plain[0].new_tokens} greedy tokens each, in fp32, with all iterations.
        """)
        counts = acceptance_by_position(self.calls[FIXED])
        section.figure(
            acceptance_figure(
                [count.conditional for count in counts],
                [count.cumulative for count in counts],
                {name: [call.tokens_per_second for call in calls] for name, calls in self.calls.items()},
            ),
            f"Left: accepted drafts by position, with {LONGEST} drafts in every round. Right: decoding speed, one point per "
            "prompt in the order of measuring, and the median.",
        )
        section.table(
            ["way", "same tokens", "tokens per round", "tokens per second", "speed-up", "least", "most"],
            [self._row(name) for name in WAYS],
            caption="Prompts whose tokens are those of plain decoding; tokens per pass of the model; medians over the prompts. "
            "Speed-up is over plain decoding of the same prompt; below 1 is slower.",
        )
        lengths = {
            name: sum((Counter(call.draft_lengths) for call in calls), Counter()) for name, calls in self.calls.items()
        }
        section.table(
            ["way", *(f"{length} drafted" for length in range(LONGEST + 1))],
            [[name, *(lengths[name][length] for length in range(LONGEST + 1))] for name in WAYS],
            caption="Rounds by number of tokens drafted. Fixed lengths draft fewer only where a text is about to end.",
        )
        section.table(
            ["position", "drafted", "tested", "accepted", "share of tested", "share of drafted"],
            [[place, *count, count.conditional, count.cumulative] for place, count in enumerate(counts, start=1)],
            caption=f"Drafts by position, {LONGEST} in every round. Tested are those whose predecessors were accepted.",
            digits=3,
        )
        section.sample("The last prompt and its continuation", self.sample)

    def _speedups(self, name: str) -> list[float]:
        """Tokens per second relative to plain decoding, by prompt."""
        pairs = zip(self.calls[name], self.calls[PLAIN], strict=True)
        return [call.tokens_per_second / plain.tokens_per_second for call, plain in pairs]

    def _row(self, name: str) -> list[Any]:
        calls, speedups = self.calls[name], self._speedups(name)
        return [
            name,
            f"{self.n_same[name]} of {len(calls)}",
            1 + sum(sum(call.accepted) for call in calls) / sum(call.row_rounds for call in calls),
            median(call.tokens_per_second for call in calls),
            median(speedups),
            min(speedups),
            max(speedups),
        ]

    def verdict(self) -> list[str]:
        """Compare tokens and speed with plain decoding."""
        different = sum(len(self.calls[name]) - same for name, same in self.n_same.items())
        warning = f"{different} calls wrote OTHER tokens: in fp32 that takes two tokens whose logits tie to rounding."
        sentences = [warning if different else "All calls wrote the same tokens."]
        for name in WAYS:
            if name == PLAIN:
                continue
            speedups = self._speedups(name)
            change = median(speedups) - 1
            sentences.append(
                f"{name}: {abs(change):.0%} {'faster' if change > 0 else 'slower'} than plain decoding in the median, "
                f"{min(speedups):.2f} to {max(speedups):.2f} times its speed."
            )
        return [
            *sentences,
            "Greedy text of a model this small tends to repeat itself, and repetition is easy to draft.",
        ]


def _decode_in_turn(
    model: MullForCausalLM, prompts: Tensor, new_tokens: int
) -> tuple[dict[str, list[GenerationStats]], dict[str, int], Tensor]:
    """Decode every prompt in every way.

    Returns:
        Statistics by way; number of calls by way whose tokens were those of plain decoding; tokens of the last plain call.
    """
    for options in WAYS.values():  # the first call of a process is slower than all others
        generate(model, prompts[:1], max_new_tokens=8, eos_token_id=[], **options)
    calls: dict[str, list[GenerationStats]] = {name: [] for name in WAYS}
    n_same = dict.fromkeys(WAYS, 0)
    plain = prompts[0]
    for prompt in prompts.split(1):
        for name, options in WAYS.items():
            output = generate(model, prompt, max_new_tokens=new_tokens, eos_token_id=[], **options)
            plain = output.sequences[0] if name == PLAIN else plain
            calls[name].append(output.stats)
            n_same[name] += torch.equal(output.sequences[0], plain)
    return calls, n_same, plain


def _beginnings(dataset: PackedDataset, n_rows: int) -> Tensor:
    """Beginnings of at most `n_rows` rows ``[n_rows, tokens]``, evenly spread over the rows that begin with one document."""
    width = min(PROMPT_TOKENS, dataset.input_ids.shape[1] // 2)
    positions = dataset.position_ids[:, :width]
    rows = dataset.input_ids[positions[:, -1] - positions[:, 0] == width - 1, :width]
    places = torch.linspace(0, len(rows) - 1, min(n_rows, len(rows))).long()
    return rows[places]
