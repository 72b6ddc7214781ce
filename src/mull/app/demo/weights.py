"""The demo's chapter on token weights: one model under several weightings, on text with planted noise.

A share of the labels is replaced by random tokens, so it is known which targets are worth nothing, and what a weighting makes of
them can be measured. The reference model of Rho-1 is the model itself before this training.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mull.app.report.figures import Series, held_out_curves
from mull.app.report.page import Report
from mull.data.noise import plant_noise
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import TrainConfig, TrainResult
from mull.training.objectives.base import Objective
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective
from mull.training.objectives.weighted_mtp import Control, HeadTraining

NOISE = 0.25
"""Share of the labels that are replaced."""

N_HEADS = 2
EVALUATIONS = 4
"""Evaluations on clean text in each run."""

SHUFFLED = ", shuffled"
"""What follows an algorithm in the name of its control."""

ARMS: dict[str, tuple[str, Control]] = {
    "baseline": ("baseline-mtp", "none"),
    "Rho-1, token_skip": ("rho1-wmtp", "none"),
    f"Rho-1{SHUFFLED}": ("rho1-wmtp", "shuffled"),
    "DFT": ("dft", "none"),
    f"DFT{SHUFFLED}": ("dft", "shuffled"),
    "entropy": ("entropy", "none"),
    f"entropy{SHUFFLED}": ("entropy", "shuffled"),
}
"""Name of a run to its algorithm and control."""

Train = Callable[
    [
        MullForCausalLM,
        Objective,
        ShuffledBatches,
        TrainConfig,
        Path,
        Callable[[MullForCausalLM], Mapping[str, float]],
        int,
    ],
    TrainResult,
]


@dataclass(frozen=True)
class WeightsStory:
    """What happened to one model under several weightings."""

    before: float
    """Clean held-out loss before, in nats per token."""

    runs: dict[str, TrainResult]


@dataclass(frozen=True, eq=False)
class MarkedRows:
    """Rows of a dataset with a mark on some of their targets, which the objective reports on and does not see."""

    dataset: PackedDataset
    marked: Tensor

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of the rows with these indices [B]."""
        return {**self.dataset.rows(indices), "marked": self.marked[indices]}


def weights_story(
    base: PreTrainedModel,
    packed: PackedDataset,
    clean_loss: Callable[[MullForCausalLM], float],
    train: Train,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> WeightsStory:
    """Continue a model with two more heads under every weighting, on the same noisy rows in the same order.

    Args:
        base: The model to continue; left as it is.
        packed: Clean training rows.
        clean_loss: Loss on clean held-out text.
        train: Runs the training loop.
        out: Folder for the metrics.
        steps: Optimizer steps of each run.
        batch_size: Rows of a step.
        seed: Of noise, order and controls.
    """
    vocab_size = base.config.get_text_config().vocab_size
    eos = base.config.get_text_config().eos_token_id
    noisy, planted = plant_noise(packed, NOISE, vocab_size=vocab_size, special_ids=[eos], seed=seed)
    reference = wrap_transformer_with_etd(copy.deepcopy(base), None).eval().requires_grad_(False)
    runs = {}
    for name, (algorithm, control) in ARMS.items():
        torch.manual_seed(seed)
        heads = MTPConfig(num_predict_tokens=N_HEADS, mtp_head_type="mlp")
        model = wrap_transformer_with_etd(copy.deepcopy(base), None, heads)
        resources = Resources(model=model, reference=reference)
        heads_training = HeadTraining(warmup_steps=steps // 2)
        objective = make_objective(algorithm, resources, heads=heads_training, control=control, seed=seed)
        config = TrainConfig(
            steps=steps,
            optimizer="muon",
            muon_lr=0.01,
            peak_lr=1e-3,
            log_every=1,
            seed=seed,
        )
        batches = ShuffledBatches(MarkedRows(noisy, planted), batch_size, seed)
        every = max(steps // EVALUATIONS, 1)
        runs[name] = train(
            model, objective, batches, config, out / name, lambda m: {"clean_loss": clean_loss(m)}, every
        )
    return WeightsStory(clean_loss(reference), runs)


def tell_weights(report: Report, story: WeightsStory) -> None:
    """Write the chapter."""
    section = report.section("Weighing tokens")
    section.prose(
        f"The base model got {N_HEADS} more heads and was continued on the same rows in the same order under several weightings "
        f"of its targets. In {100 * NOISE:.0f} % of the targets the token was replaced by a random one; held-out text is clean. "
        "Weights have mean 1 in every step, so that a weighting changes what is learnt and not how fast; a shuffled control "
        "puts the same weights on other targets. Rho-1 drops the 30 % of targets on which the model exceeds its reference least; "
        "the reference is the base model itself."
    )
    curves = {name: _clean_curve(name, run, story.before) for name, run in story.runs.items()}
    controls = {name: curves[other] for name in curves if (other := _control(name)) in curves and other != name}
    section.figure(
        held_out_curves([curve for name, curve in curves.items() if SHUFFLED not in name], controls),
        "Loss on clean held-out text while the model is trained on noisy text; shuffled controls dashed.",
    )
    section.table(
        ["run", "clean loss", "change", "head 1", "head 2"],
        [_losses(name, run, story.before) for name, run in story.runs.items()],
        caption=(
            f"Clean held-out loss in nats per token, {story.before:.3f} before; loss of the further heads on the noisy targets "
            "that they were trained on in the last step. One seed."
        ),
    )
    section.table(
        ["run", "weight of noise", "effective sample", "entropy", "zero"],
        [_weights(name, run) for name, run in story.runs.items()],
        caption=(
            "Mean weight of planted targets, where the mean of all is 1; effective sample size as a share of the targets, "
            "normalised entropy, and share of targets without weight; averaged over the steps."
        ),
    )
    section.prose(_verdict(story))


def _clean_curve(name: str, run: TrainResult, before: float) -> Series:
    evaluated = [record for record in run.history if "eval_clean_loss" in record]
    return Series(
        label=name,
        x=[0, *(record["tokens"] for record in evaluated)],
        y=[before, *(record["eval_clean_loss"] for record in evaluated)],
    )


def _control(name: str) -> str:
    return f"{name.split(',')[0]}{SHUFFLED}"


def _losses(name: str, run: TrainResult, before: float) -> list[Any]:
    last = run.history[-1]
    clean = last["eval_clean_loss"]
    return [name, clean, clean - before, last["head1_loss"], last["head2_loss"]]


def _weights(name: str, run: TrainResult) -> list[Any]:
    metrics = ["weights/marked", "weights/ess", "weights/entropy", "weights/zero_rate"]
    return [name, *(sum(record[metric] for record in run.history) / len(run.history) for metric in metrics)]


def _verdict(story: WeightsStory) -> str:
    """What the numbers say, whichever way they fall."""
    final = {name: run.history[-1]["eval_clean_loss"] for name, run in story.runs.items()}
    sentences = []
    for name, loss in final.items():
        if name == "baseline" or SHUFFLED in name:
            continue
        gain, control = final["baseline"] - loss, final["baseline"] - final[_control(name)]
        where, where_control = ("below" if difference > 0 else "above" for difference in (gain, control))
        sentences.append(
            f"{name} ends {abs(gain):.3f} nats {where} the baseline on clean text, its shuffled control {abs(control):.3f} "
            f"{where_control}."
        )
    return " ".join(sentences)
