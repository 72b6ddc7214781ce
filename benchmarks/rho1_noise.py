"""Rho-1 on a language with planted noise: does it find the noise, and does that help on clean text?

The language is a first-order Markov chain, so its entropy is known and no model can have a lower loss. A share of the training
labels is replaced by random tokens; a reference model of the same size has seen clean text of the same language. All arms train
on the same noisy rows in the same order, from the same initial weights, and are evaluated on clean held-out text. The reference's
training tokens are not counted, so Rho-1 profits from clean text that the baseline never sees. The row ``reference`` shows what
that text alone is worth.

    python benchmarks/rho1_noise.py [--settings main weak-reference …] [--seeds 3] [--steps 100] [--threads 1]
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.app.demo.weights import MarkedRows
from mull.data.noise import plant_noise
from mull.data.packing import PackedDataset, pack_tokens
from mull.data.sampler import ShuffledBatches
from mull.training.loop import TrainConfig, train
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective
from mull.training.objectives.weighted_mtp import Control
from mull.training.objectives.weightings import Rho1Config

VOCAB = 32
PAD = 0
SUCCESSORS = 4
LENGTH = 64
ROWS = {"train": 4000, "reference": 4000, "held_out": 256}
BATCH_SIZE = 16
REFERENCE = "reference"
BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One way to train on the noisy text."""

    algorithm: str = "rho1-wmtp"
    control: Control = "none"
    rho1: Rho1Config = field(default_factory=Rho1Config)


ARMS = {
    BASELINE: Arm("baseline-mtp"),
    "rho1 weighted": Arm(rho1=Rho1Config(mode="weighted")),
    "rho1 weighted, shuffled": Arm(rho1=Rho1Config(mode="weighted"), control="shuffled"),
    "rho1 token_skip": Arm(rho1=Rho1Config(mode="token_skip")),
    "rho1 token_skip, shuffled": Arm(rho1=Rho1Config(mode="token_skip"), control="shuffled"),
    "dft": Arm("dft"),
    "entropy": Arm("entropy"),
}


@dataclass(frozen=True)
class Setting:
    """Where the noise is, and what the reference knows."""

    share: float = 0.25
    where: Literal["labels", "tokens"] = "labels"
    reference_share: float = 0.0
    """Share of noise in the text of the reference."""
    reference_steps: int | None = None
    """Steps that the reference is trained for; None: as many as the arms."""


SETTINGS = {
    "main": Setting(),
    "noise-in-input": Setting(where="tokens"),
    "half-noise": Setting(share=0.5),
    "no-noise": Setting(share=0.0),
    "weak-reference": Setting(reference_steps=10),
    "weak-reference-no-noise": Setting(share=0.0, reference_steps=10),
    "noisy-reference": Setting(reference_share=0.25),
}


@dataclass(frozen=True)
class Language:
    """First-order Markov chain: every token has `SUCCESSORS` followers."""

    probabilities: np.ndarray
    """[V, S]"""
    successors: np.ndarray
    """[V, S]"""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Language":
        """A random language; token 0 is padding and does not occur."""
        probabilities = rng.dirichlet([0.3] * SUCCESSORS, size=VOCAB)
        successors = np.stack([1 + rng.permutation(VOCAB - 1)[:SUCCESSORS] for _ in range(VOCAB)])
        return cls(probabilities, successors)

    def write(self, rows: int, rng: np.random.Generator) -> PackedDataset:
        """Rows of one document each."""
        tokens = [rng.integers(1, VOCAB, rows)]
        while len(tokens) < LENGTH:
            cumulative = self.probabilities[tokens[-1]].cumsum(1)
            choice = (cumulative < rng.random((rows, 1))).sum(1).clip(max=SUCCESSORS - 1)
            tokens.append(self.successors[tokens[-1], choice])
        return pack_tokens(np.stack(tokens, 1).tolist(), length=LENGTH, pad_id=PAD)

    def best_loss(self, dataset: PackedDataset) -> float:
        """Mean loss in nats of the language's own probabilities on its text."""
        before, after = dataset.input_ids[:, :-1].numpy(), dataset.input_ids[:, 1:].numpy()
        hit = self.successors[before] == after[..., None]
        return float(-np.log((self.probabilities[before] * hit).sum(-1)).mean())


def new_model(seed: int) -> MullForCausalLM:
    """A small Qwen3."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), None)


def fit(
    seed: int, dataset: PackedDataset, planted: Tensor, arm: Arm, steps: int, reference: MullForCausalLM | None = None
) -> tuple[MullForCausalLM, float | None]:
    """Train a new model; return it, and the mean weight of planted targets where the mean over all targets is 1."""
    model = new_model(seed)
    settings = arm.rho1 if arm.algorithm == "rho1-wmtp" else None
    resources = Resources(model=model, reference=reference)
    objective = make_objective(arm.algorithm, resources, settings, control=arm.control, seed=seed)
    batches = ShuffledBatches(MarkedRows(dataset, planted), BATCH_SIZE, seed)
    config = TrainConfig(
        steps=steps, warmup_steps=20, optimizer="muon", peak_lr=3e-3, muon_lr=0.02, precision="fp32", log_every=1
    )
    history = train(model, objective, batches, config).history
    weights = [record["weights/marked"] for record in history if "weights/marked" in record]
    return model.eval(), statistics.mean(weights) if weights else None


@torch.no_grad()
def mean_loss(model: MullForCausalLM, dataset: PackedDataset) -> float:
    """Next-token loss in nats per target; all rows have equally many."""
    losses = [model(**batch, use_cache=False).loss for batch in dataset.in_order(64)]
    return float(torch.stack(losses).mean())


Result = dict[str, dict[str, float | None]]


def run_seed(setting: Setting, seed: int, steps: int, arms: Mapping[str, Arm]) -> Result:
    """Train the reference and every arm.

    Returns:
        By arm: ``excess``, the loss on clean held-out text above that of the language itself, in nats; and
        ``noise_weight``, the mean weight of planted targets in training.
    """
    rng = np.random.default_rng((seed, 2024))
    language = Language.draw(rng)
    text = {name: language.write(rows, rng) for name, rows in ROWS.items()}
    best = language.best_loss(text["held_out"])

    def noisy(name: str, share: float) -> tuple[PackedDataset, Tensor]:
        return plant_noise(text[name], share, vocab_size=VOCAB, special_ids=[PAD], seed=seed, where=setting.where)

    reference_steps = steps if setting.reference_steps is None else setting.reference_steps
    reference, _ = fit(seed + 100, *noisy("reference", setting.reference_share), ARMS[BASELINE], reference_steps)
    results: Result = {REFERENCE: {"excess": mean_loss(reference, text["held_out"]) - best, "noise_weight": None}}
    rows = noisy("train", setting.share)
    for name, arm in arms.items():
        model, weight = fit(seed, *rows, arm, steps, reference)
        results[name] = {"excess": mean_loss(model, text["held_out"]) - best, "noise_weight": weight}
    return results


def summary(by_seed: list[Result]) -> dict[str, dict[str, Any]]:
    """Mean and spread over the seeds by arm; differences are paired with the baseline of the same seed."""
    table = {}
    for arm in by_seed[0]:
        excess = [result[arm]["excess"] for result in by_seed]
        paired = [result[arm]["excess"] - result[BASELINE]["excess"] for result in by_seed]  # type: ignore[operator]
        weights = [result[arm]["noise_weight"] for result in by_seed]
        known = None not in weights
        table[arm] = {
            "excess": excess,
            "excess_mean": statistics.mean(excess),  # type: ignore[type-var]
            "excess_std": statistics.stdev(excess) if len(excess) > 1 else 0.0,  # type: ignore[type-var]
            "minus_baseline": paired,
            "minus_baseline_mean": statistics.mean(paired),
            "minus_baseline_std": statistics.stdev(paired) if len(paired) > 1 else 0.0,
            "noise_weight": statistics.mean(weights) if known else None,  # type: ignore[type-var]
        }
    return table


def show(name: str, setting: Setting, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one setting."""
    print(f"\n{name}: {setting}")
    print(f"{'arm':28} {'excess loss':>18} {'minus baseline':>20} {'weight of noise':>16}")
    for arm, row in table.items():
        weight = "" if row["noise_weight"] is None else f"{row['noise_weight']:.3f}"
        print(
            f"{arm:28} {row['excess_mean']:9.4f} ± {row['excess_std']:.4f}  {row['minus_baseline_mean']:+10.4f} ± "
            f"{row['minus_baseline_std']:.4f} {weight:>16}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["main"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rho1_noise.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started, tables = time.perf_counter(), {}
    for name in arguments.settings:
        by_seed = [run_seed(SETTINGS[name], seed, arguments.steps, ARMS) for seed in range(arguments.seeds)]
        tables[name] = summary(by_seed)
        show(name, SETTINGS[name], tables[name])
    record = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}, fp32",
        "seconds": round(time.perf_counter() - started, 1),
        "seeds": list(range(arguments.seeds)),
        "steps": arguments.steps,
        "tokens_per_arm": arguments.steps * BATCH_SIZE * LENGTH,
        "settings": tables,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{record['seconds']} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
