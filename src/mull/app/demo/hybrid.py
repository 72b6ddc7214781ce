"""The demo's chapter on conversion: the softmax model becomes a hybrid of Gated DeltaNet and gated attention, and is healed.

The teacher is the base model. It is converted with and without a calibrated start, and both hybrids learn its predictions from
the same rows in the same order.
"""

from dataclasses import dataclass
from typing import Any, Self

from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.app.report.figures import held_out_curves
from mull.app.report.page import Rows, Table
from mull.data.sampler import ShuffledBatches
from mull.evaluation.divergence import StartDivergence, step_zero
from mull.evaluation.held_out import held_out_loss
from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.calibrate import calibrate_starts
from mull.retrofit.convert import create_hybrid_from_qwen3
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import Evaluation, TrainResult
from mull.training.objectives.distill import DistillConfig
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

CALIBRATED, PLAIN = "calibrated start", "start without data"
EVALUATIONS = 4
"""Evaluations in each run."""


@dataclass(frozen=True)
class Hybrid:
    """A conversion, and how much of the teacher two starts got back."""

    layers: dict[str, int]
    """Numbers of layers by what they are."""

    parameters: dict[str, int]
    teacher: float
    """Held-out loss of the teacher, in nats per token."""

    starts: list[StartDivergence]
    before: dict[str, float]
    """Held-out loss by start, before any training."""

    runs: dict[str, TrainResult]

    @classmethod
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Convert the base model, and distil it into both hybrids."""
        size, text, base = bench.size, loops.text, loops.base.eval()
        print(f"hybrid: {size.hybrid_steps} steps of distillation from each of two starts")
        teacher = wrap_transformer_with_etd(base, None).eval().requires_grad_(False)
        students = {PLAIN: create_hybrid_from_qwen3(base)}
        delta = [layer for layer, kind in enumerate(students[PLAIN].model.kinds) if kind == "linear_attention"]
        calibration = text.train.input_ids[: size.calibration_rows].split(size.batch_size)
        starts = calibrate_starts(base, calibration, delta)
        students[CALIBRATED] = create_hybrid_from_qwen3(base, starts=starts)
        rows = size.held_out_rows // 3
        table = step_zero(base, text.held_out.input_ids[:rows].split(size.batch_size), {CALIBRATED: starts})

        def loss(model: MullForCausalLM) -> dict[str, float]:
            return {"held_out": held_out_loss(model, text.held_out, None, max_rows=rows)}

        before = {name: loss(student)["held_out"] for name, student in students.items()}
        evaluation = Evaluation(loss, every=max(size.hybrid_steps // EVALUATIONS, 1))
        batches = ShuffledBatches(text.train, size.batch_size, 2000 + bench.seed)
        runs = {}
        for name, student in students.items():
            settings = DistillConfig(alpha=1.0, temperature=1.0)
            objective = make_objective("distill", Resources(model=student, reference=teacher), settings)
            folder = f"hybrid/{name}"
            runs[name] = bench.train(
                folder, student, objective, batches, evaluation=evaluation, steps=size.hybrid_steps, warmup_steps=2
            )
        parameters = {"source": base.num_parameters(), "hybrid": students[PLAIN].num_parameters()}
        layers = students[PLAIN].get_layer_stats()
        return cls(layers, parameters, loss(teacher)["held_out"], table, before, runs)

    def tell(self) -> dict[str, Any]:
        """Step 0, and the way back to the teacher."""
        ends = {name: run.history[-1]["eval_held_out"] for name, run in self.runs.items()}
        curves = {
            name: {
                0: self.before[name],
                **{r["tokens"]: r["eval_held_out"] for r in run.history if "eval_held_out" in r},
            }
            for name, run in self.runs.items()
        }
        last = max(next(reversed(curve)) for curve in curves.values())
        flat = ("teacher", {0: self.teacher, last: self.teacher})
        starts: Rows = [[row.start, row.divergence, row.standard_error] for row in self.starts]
        healed: Rows = [[name, self.before[name], end, end - self.teacher] for name, end in ends.items()]
        return {
            "growth": self.parameters["hybrid"] / self.parameters["source"] - 1,
            "starts": Table(["start", "KL(teacher, hybrid)", "standard error"], starts),
            "recovery": held_out_curves(curves, {CALIBRATED: flat}),
            "healed": Table(["start", "before", "after", "above the teacher"], healed),
            "tokens": last,
        }
