"""The demo's chapter on token weights: one model under several weightings, on text with planted noise.

Some labels are replaced by random tokens, so we know which targets are worthless and can measure what each weighting does with
them. The reference model of Rho-1 is the base model itself.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.app.report.figures import held_out_curves
from mull.app.report.page import Rows, Table
from mull.data.noise import plant_noise
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.evaluation.held_out import held_out_loss
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import Evaluation, TrainResult
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective
from mull.training.objectives.weighted_mtp import Control, HeadTraining

NOISE = 0.25
"""Share of the labels that are replaced."""

N_HEADS = 2
EVALUATIONS = 4
"""Evaluations on clean text in each run."""

BASELINE = "baseline"
SHUFFLED = ", shuffled"
"""Suffix of an algorithm's control."""

ARMS: dict[str, tuple[str, Control]] = {
    BASELINE: ("baseline-mtp", "none"),
    "Rho-1, token_skip": ("rho1-wmtp", "none"),
    f"Rho-1{SHUFFLED}": ("rho1-wmtp", "shuffled"),
    "DFT": ("dft", "none"),
    f"DFT{SHUFFLED}": ("dft", "shuffled"),
    "entropy": ("entropy", "none"),
    f"entropy{SHUFFLED}": ("entropy", "shuffled"),
}
"""Name of a run to its algorithm and control."""

CONTROLS = {name: f"{name.split(',')[0]}{SHUFFLED}" for name in ARMS if name != BASELINE and SHUFFLED not in name}
"""Name of a weighted run to the name of its control."""


@dataclass(frozen=True, eq=False)
class MarkedRows:
    """Rows of a dataset with a mark on some of their targets, which the objective reports on but does not use."""

    dataset: PackedDataset
    marked: Tensor

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B]."""
        return {**self.dataset.rows(indices), "marked": self.marked[indices]}


@dataclass(frozen=True)
class Weights:
    """One model under several weightings."""

    before: float
    """Clean held-out loss before training, in nats per token."""

    runs: dict[str, TrainResult]

    @classmethod
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Continue the base model with two extra heads under every weighting, on the same noisy rows in the same order."""
        steps, base = bench.size.weights_steps, loops.base
        print(f"weights: {steps} steps under each of {len(ARMS)} weightings, on text with planted noise")
        config = base.config.get_text_config()
        noisy, planted = plant_noise(
            loops.text.train, NOISE, vocab_size=config.vocab_size, special_ids=[config.eos_token_id], seed=bench.seed
        )
        batches = ShuffledBatches(MarkedRows(noisy, planted), bench.size.batch_size, bench.seed)
        reference = wrap_transformer_with_etd(copy.deepcopy(base), None).eval().requires_grad_(False)

        def clean_loss(model: MullForCausalLM) -> dict[str, float]:
            rows = bench.size.held_out_rows // 3
            return {"clean_loss": held_out_loss(model, loops.text.held_out, None, max_rows=rows)}

        evaluation = Evaluation(clean_loss, every=max(steps // EVALUATIONS, 1))
        settings = {"steps": steps, "muon_lr": 0.01, "peak_lr": 1e-3}
        runs = {}
        for name, (algorithm, control) in ARMS.items():
            torch.manual_seed(bench.seed)
            heads = MTPConfig(num_predict_tokens=N_HEADS, mtp_head_type="mlp")
            model = wrap_transformer_with_etd(copy.deepcopy(base), None, heads)
            resources = Resources(model=model, reference=reference)
            head_training = HeadTraining(warmup_steps=steps // 2)
            objective = make_objective(algorithm, resources, heads=head_training, control=control, seed=bench.seed)
            folder = f"weights/{name}"
            runs[name] = bench.train(folder, model, objective, batches, evaluation=evaluation, **settings)
        return cls(clean_loss(reference)["clean_loss"], runs)

    def tell(self) -> dict[str, Any]:
        """Clean loss, and where the weights went."""
        curves = {name: self._clean_curve(run) for name, run in self.runs.items()}
        last = {name: run.history[-1] for name, run in self.runs.items()}
        clean = {name: record["eval_clean_loss"] for name, record in last.items()}
        losses: Rows = [
            [n, clean[n], clean[n] - self.before, r["head1_loss"], r["head2_loss"]] for n, r in last.items()
        ]
        metrics = ["weights/marked", "weights/ess", "weights/entropy", "weights/zero_rate"]
        weights: Rows = [[name, *(_mean(run, metric) for metric in metrics)] for name, run in self.runs.items()]
        real = {name: curve for name, curve in curves.items() if SHUFFLED not in name}
        controls = {name: (control, curves[control]) for name, control in CONTROLS.items()}
        return {
            "n_heads": N_HEADS,
            "noise": NOISE,
            "curves": held_out_curves(real, controls),
            "losses": Table(["run", "clean loss", "change", "head 1", "head 2"], losses),
            "weights": Table(["run", "weight of noise", "effective sample", "entropy", "zero"], weights),
            "gains": {name: clean[BASELINE] - loss for name, loss in clean.items()},
            "controls": CONTROLS,
        }

    def _clean_curve(self, run: TrainResult) -> dict[int, float]:
        return {0: self.before, **{r["tokens"]: r["eval_clean_loss"] for r in run.history if "eval_clean_loss" in r}}


def _mean(run: TrainResult, metric: str) -> float:
    return sum(record[metric] for record in run.history) / len(run.history)
