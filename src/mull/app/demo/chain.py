"""The demo's chapter on a task that needs depth: following chains of edges, one edge per iteration."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from mull.app.demo.chapter import Bench, table_by_iterations
from mull.app.report.figures import accuracy_against_iterations
from mull.data.chain import ChainTask, accuracy_by_hops
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.objectives.base import Batch, batch_states_by_iteration
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.step_supervision import StepSupervision

TASK = ChainTask()


@dataclass(frozen=True)
class Chain:
    """A looped model of about 0.1 million parameters, and a control with the same parameters and steps in a single pass."""

    model: MullForCausalLM
    n_prompts: int
    overall: dict[int, float]
    """Accuracy over questions of 1 to 7 hops, by number of iterations."""

    by_hops: dict[int, dict[int, float]]
    """Accuracy by number of hops and number of iterations."""

    single_pass: float
    """Accuracy of the control over questions of 1 to 7 hops."""

    @classmethod
    def train(cls, bench: Bench) -> Self:
        """Supervise the looped model after every iteration, and the control on the answers alone."""
        model, control = (chain_model(TASK, bench.seed) for _ in range(2))
        print(f"chain task: {model.num_parameters():,} parameters, {bench.size.chain_steps} steps, then the control")
        settings: dict[str, Any] = {
            "steps": bench.size.chain_steps,
            "peak_lr": 2e-3,
            "weight_decay": 0.0,
            "schedule": "wsd",
            "decay_share": 0.5,
            "precision": "fp32",  # matrices of width 64: bf16 is 1.6 times slower
        }
        batches = TASK.batches(32, bench.seed)
        # The tokens of the prompt have nothing left to compute after the first iteration.
        sampling = IterationSampling(kind="uniform", minimum=2, maximum=TASK.max_train_hops)
        sampled = StepSupervision(sampling, stop_unlabelled=True)
        bench.train("chain", model, sampled, batches, **settings)

        def answers(index: int) -> Batch:
            batch = batches(index)
            return {**batch, "step_labels": batch["step_labels"][..., -1:]}

        once = StepSupervision(IterationSampling(kind="fixed", maximum=1))
        bench.train("chain-control", control, once, answers, **settings)
        model.save_pretrained(bench.out / "chain-model")
        n_prompts = bench.size.chain_prompts
        overall, by_hops = chain_accuracy(model, TASK, n_prompts, bench.seed)
        single_pass, _ = chain_accuracy(control, TASK, n_prompts, bench.seed)
        return cls(model, n_prompts, overall, by_hops, single_pass[1])

    def tell(self) -> dict[str, Any]:
        """Accuracy against iterations."""
        all_hops = f"1 to {TASK.max_hops}"
        rows = {all_hops: self.overall, **{str(hops): row for hops, row in self.by_hops.items()}}
        percent = {name: {k: 100 * share for k, share in row.items()} for name, row in rows.items()}
        return {
            "task": TASK,
            "n_parameters": self.model.num_parameters(),
            "accuracy": accuracy_against_iterations(
                {f"questions of {all_hops} hops": self.overall},
                self.by_hops,
                held_out_hops=range(TASK.max_train_hops + 1, TASK.max_hops + 1),
                trained_iterations=TASK.max_train_hops,
            ),
            "shares": table_by_iterations("hops", percent),
            "best": max(self.overall, key=lambda k: self.overall[k]),
        }


def chain_model(task: ChainTask, seed: int) -> MullForCausalLM:
    """A fresh model of about 0.1 million parameters: one layer that encodes and one that thinks."""
    config = Qwen3Config(
        vocab_size=task.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=task.length,
    )
    torch.manual_seed(seed)
    etd = ETDConfig(n_encoder_layers=1, n_think_layers=1, n_decoder_layers=0, max_think_iterations=task.max_train_hops)
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), etd)


@torch.no_grad()
def chain_accuracy(
    model: MullForCausalLM, task: ChainTask, n_prompts: int, seed: int
) -> tuple[dict[int, float], dict[int, dict[int, float]]]:
    """Share of right answers after 1 to 9 iterations of the queries, on fresh prompts with every number of hops.

    Returns:
        By number of iterations, over all questions of at least one hop; and by number of hops and of iterations.
    """
    batch = task.batches(n_prompts, seed, train=False)(0)
    states = batch_states_by_iteration(model, batch, 9, torch.where(batch["hops"] >= 0, 9, 1))
    overall: dict[int, float] = {}
    by_hops: dict[int, dict[int, float]] = {hops: {} for hops in range(1, task.max_hops + 1)}
    for iterations, state in enumerate(states, start=1):
        counts = accuracy_by_hops(model.lm_head(state).argmax(-1), batch)
        for hops, results in by_hops.items():
            results[iterations] = counts[hops][0] / counts[hops][1]
        right, total = (sum(counts[hops][part] for hops in by_hops) for part in (0, 1))
        overall[iterations] = right / total
    return overall, by_hops
