"""The demo's chapter on adaptive depth: tokens of the looped models stop thinking when they are done.

On the chain task, the number of iterations that a question needs is known, so a rule can be judged. On text it is not: there,
each rule stands beside fixed depths, random stops and the oracle. One sample is written adaptively, and shown token by token.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from mull.app.demo.chain import TASK, Chain
from mull.app.demo.chapter import Bench
from mull.app.demo.loops import PROMPTS, Loops
from mull.app.report.figures import depth_figure, hops_figure
from mull.app.report.inspect_page import write_inspection
from mull.app.report.page import Rows, Table
from mull.decoding.generate import generate
from mull.evaluation.depth_trace import DepthTrace, trace_depth
from mull.evaluation.search.calibration import Calibration, calibrate
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig

COSINES = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998)
PROBABILITIES = (0.5, 0.9, 0.99, 0.999, 0.9999)
MOST = 12
"""Iterations of the chain task at most: more than its deepest question needs."""

INSPECTION = "inspect.html"


@dataclass(frozen=True)
class Depth:
    """What rules gave on both tasks."""

    chain: list[tuple[str, float, float, float]]
    """Rule, threshold, mean iterations of a question, share of right answers."""

    by_hops: dict[int, float]
    """Mean iterations by hops of the question, with the best threshold of the rule `state`."""

    text: Calibration
    trace: DepthTrace
    sample: str
    """The sample's tokens, each with the iterations that it took."""

    @classmethod
    def train(cls, bench: Bench, loops: Loops, chain: Chain) -> Self:
        """Measure rules; nothing is trained here."""
        print("depth: halting rules on chains and on text")
        points, by_hops = chain_depths(chain.model, bench.size.chain_prompts, bench.seed)
        iterations = bench.size.max_iterations
        text = calibrate(
            loops.looped,
            loops.text.held_out,
            target_iterations=(1 + iterations) / 2,
            max_rows=bench.size.depth_rows,
            seed=bench.seed,
        )
        tokenizer = loops.text.tokenizer
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        written = generate(
            loops.looped, ids, max_new_tokens=bench.size.new_tokens, adaptive=text.halting, eos_token_id=[]
        )
        trace = trace_depth(loops.looped, written.sequences, text.halting)
        write_inspection(
            trace,
            tokenizer,
            bench.out / INSPECTION,
            title="How long the tokens of the looped model think",
            command="mull demo",
            n_prompt=ids.shape[1],
            drafted=[False] * len(trace.tokens),
        )
        marked = [f"{tokenizer.decode([token.token])}[{len(token.iterations)}]" for token in trace.tokens]
        return cls(points, by_hops, text, trace, "".join(marked))

    def tell(self) -> dict[str, Any]:
        """Accuracy and loss against executed layers, and the sample."""
        best = {name: max(self._of(name), key=lambda point: (point[3], -point[2])) for name in ("fixed", "state")}
        rows: Rows = [[name, f"{value:g}", depth, 100 * share] for name, value, depth, share in self.chain]
        return {
            "accuracy": hops_figure(
                {name: {point[2]: point[3] for point in self._of(name)} for name in ("fixed", "state", "confidence")},
                self.by_hops,
            ),
            "thresholds": Table(["rule", "threshold", "iterations", "right (%)"], rows),
            "best": best,
            "confident": max(
                (point[3] for point in self._of("confidence") if point[2] <= best["fixed"][2]), default=0.0
            ),
            "loss": depth_figure(self.text.curve),
            "sample": self.sample,
            "page": INSPECTION,
        }

    def _of(self, rule: str) -> list[tuple[str, float, float, float]]:
        return [point for point in self.chain if point[0] == rule]


@torch.no_grad()
def chain_depths(
    model: MullForCausalLM, n_prompts: int, seed: int
) -> tuple[list[tuple[str, float, float, float]], dict[int, float]]:
    """Accuracy on chains by rule and threshold, and the depth of questions; see `Depth`."""
    batch = TASK.batches(n_prompts, seed, train=False)(1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    queries, asked = batch["hops"] >= 0, batch["hops"] > 0
    roots, hops = batch["step_labels"][..., -1][asked], batch["hops"][asked]

    def measured(config: HaltingConfig, most: int) -> tuple[float, torch.Tensor]:
        # Only queries think: tokens of the prompt stop after the first iteration, as in the training.
        policy = model.model.halting(config, most, queries, model.lm_head)
        assert policy is not None, "a configuration makes a call adaptive"
        states = model.model.hidden_states(**inputs, think_iterations=most, policy=policy)
        answers = model.lm_head(states[asked]).argmax(-1)
        assert policy.depth is not None, "asked after the pass"
        return float((answers == roots).float().mean()), policy.depth[asked].float()

    points, best = [], 0.0
    by_hops: dict[int, float] = {}
    for most in range(1, MOST + 1):
        share, depths = measured(HaltingConfig(rule="fixed"), most)
        points.append(("fixed", float(most), float(depths.mean()), share))
    for rule, thresholds in (("state", COSINES), ("confidence", PROBABILITIES)):
        for threshold in thresholds:
            share, depths = measured(HaltingConfig(rule=rule, threshold=threshold), MOST)
            points.append((rule, threshold, float(depths.mean()), share))
            if rule == "state" and share > best:
                best = share
                by_hops = {hop: float(depths[hops == hop].mean()) for hop in range(1, TASK.max_hops + 1)}
    return points, by_hops
