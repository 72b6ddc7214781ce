"""The demo's chapter on drafting: the looped model gets heads that draft, and writes the same text with and without them.

Iterations make a token more expensive but not a draft, so this is where drafts should pay. The trunk is frozen, so the text stays
that of the looped model. The heads learn from text that the model wrote, because that is what they have to predict. The ways of
decoding alternate on every prompt, and each is compared with plain decoding of the same prompt, because the speed of a machine
drifts.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor

from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.app.report.figures import acceptance_figure
from mull.app.report.page import Rows, Table
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.decoding.generate import GenerateOutput, GenerationStats, generate
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
    """Calls by way whose tokens were those of plain decoding."""

    sample: str
    """One prompt and its continuation."""

    @classmethod
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Train heads on the frozen model, save it with them, and decode held-out prompts in every way in turn."""
        size = bench.size
        print(f"drafting: {size.own_rows} rows of the model's own text, {size.drafting_steps} steps for its heads")
        torch.manual_seed(bench.seed)
        model = from_pretrained(str(bench.out / "model"), mtp=HEADS)
        heads = model.mtp_heads
        assert heads is not None

        iterations = model.iterations(None)
        # Greedy, as the model will decode.
        prompts = _beginnings(loops.text.train, size.own_rows)
        output = generate(model, prompts, max_new_tokens=size.own_tokens, eos_token_id=[])
        own = output.sequences
        dataset = PackedDataset(own, own, torch.arange(own.shape[1]).expand_as(own).contiguous())
        fixed = IterationSampling(kind="fixed", maximum=iterations)
        objective = make_objective("baseline-mtp", Resources(model=model, iterations=fixed))
        batches = ShuffledBatches(dataset, size.batch_size, bench.seed)
        run = bench.train("drafting", model, objective, batches, steps=size.drafting_steps, trainable="heads")
        model.save_pretrained(bench.out / "drafting" / "model")
        loops.text.tokenizer.save_pretrained(bench.out / "drafting" / "model")

        prompts = _beginnings(loops.text.held_out, size.drafting_prompts)
        outputs = _decode_in_turn(model, prompts, size.drafting_tokens)
        calls = {name: [output.stats for output in of_way] for name, of_way in outputs.items()}
        tokens = {name: torch.stack([output.sequences[0] for output in of_way]) for name, of_way in outputs.items()}
        n_same = {name: int((ids == tokens[PLAIN]).all(-1).sum()) for name, ids in tokens.items()}
        n_parameters = sum(parameter.numel() for parameter in heads.parameters())
        sample = str(loops.text.tokenizer.decode(tokens[PLAIN][-1]))
        return cls(iterations, output.stats, run, n_parameters, calls, n_same, sample)

    def tell(self) -> dict[str, Any]:
        """Heads, acceptance, and speed."""
        losses = [format(self.run.history[-1][f"head{k}_loss"], ".2f") for k in range(LONGEST + 1)]
        counts = acceptance_by_position(self.calls[FIXED])
        lengths = range(LONGEST + 1)
        speeds = {name: [call.tokens_per_second for call in calls] for name, calls in self.calls.items()}
        ways = ["way", "same tokens", "tokens per round", "tokens per second", "speed-up", "least", "most"]
        drafted: Rows = [
            [name, *(sum(call.draft_lengths.get(length, 0) for call in calls) for length in lengths)]
            for name, calls in self.calls.items()
        ]
        shares = [[place, *count, count.conditional, count.cumulative] for place, count in enumerate(counts, start=1)]
        positions = ["position", "drafted", "tested", "accepted", "share of tested", "share of drafted"]
        return {
            "longest": LONGEST,
            "losses": losses,
            "acceptance": acceptance_figure(
                [count.conditional for count in counts], [count.cumulative for count in counts], speeds
            ),
            "speeds": Table(ways, [self._row(name) for name in WAYS]),
            "lengths": Table(["way", *(f"{length} drafted" for length in lengths)], drafted),
            "positions": Table(positions, shares, digits=3),
            "sample": self.sample,
            "n_different": sum(len(self.calls[name]) - same for name, same in self.n_same.items()),
        }

    def _row(self, name: str) -> list[Any]:
        """Tokens and speed of one way; the speed-up is relative to plain decoding of the same prompt."""
        calls = self.calls[name]
        pairs = zip(calls, self.calls[PLAIN], strict=True)
        speedups = [call.tokens_per_second / plain.tokens_per_second for call, plain in pairs]
        same = f"{self.n_same[name]} of {len(calls)}"
        per_round = 1 + sum(sum(call.accepted) for call in calls) / sum(call.row_rounds for call in calls)
        speed = median(call.tokens_per_second for call in calls)
        return [name, same, per_round, speed, median(speedups), min(speedups), max(speedups)]


def _decode_in_turn(model: MullForCausalLM, prompts: Tensor, new_tokens: int) -> dict[str, list[GenerateOutput]]:
    """Decode every prompt in every way; the outputs by way."""
    for options in WAYS.values():  # the first call of a process is slower than all others
        generate(model, prompts[:1], max_new_tokens=8, eos_token_id=[], **options)
    outputs: dict[str, list[GenerateOutput]] = {name: [] for name in WAYS}
    for prompt in prompts.split(1):
        for name, options in WAYS.items():
            outputs[name].append(generate(model, prompt, max_new_tokens=new_tokens, eos_token_id=[], **options))
    return outputs


def _beginnings(dataset: PackedDataset, n_rows: int) -> Tensor:
    """Beginnings of at most `n_rows` rows ``[n_rows, tokens]``, evenly spread over the rows that begin with one document."""
    width = min(PROMPT_TOKENS, dataset.input_ids.shape[1] // 2)
    positions = dataset.position_ids[:, :width]
    rows = dataset.input_ids[positions[:, -1] - positions[:, 0] == width - 1, :width]
    places = torch.linspace(0, len(rows) - 1, min(n_rows, len(rows))).long()
    return rows[places]
