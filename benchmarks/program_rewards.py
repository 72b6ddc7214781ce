"""Executed programs as reward: does grpo-wmtp learn from it what demonstrations leave open, and not from shuffled rewards?

The task is generated (`mull.data.programs`): ``times 3 plus 7`` asks for ``def f(x): return x * 3 + 7``. Of the demonstrations,
60 % have a second number that is one too high: a model that imitates them perfectly passes the tests in 40 % of its answers, and
its most likely answer is wrong. From there grpo-wmtp trains on the share of tests that sampled programs pass in the sandbox. The
control gets the same rewards in another order: shuffled over all answers of a step, so that mean and spread are those of true
rewards. Tasks of the measurement were neither demonstrated nor rewarded.

    python benchmarks/program_rewards.py [--seeds 3] [--warmup 300] [--steps 40] [--workers 4] [--out FILE]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import header
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3Config

from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.data.packing import pack_examples
from mull.data.programs import PromptBatches, demonstrations, rule_tokenizer, rules
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import TextEncoder
from mull.evaluation.program_reward import ProgramReward, pass_rates
from mull.training.loop import TrainConfig, train
from mull.training.objectives.base import Batch
from mull.training.objectives.grpo import GroupRelative, GRPOConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Graded, Reward
from mull.training.objectives.weighted_mtp import WeightedMTP

WRONG = 0.6
LENGTH, MAX_NEW_TOKENS = 18, 12
PROMPTS, ANSWERS = 16, 8
SAMPLES = 8
"""Answers per task of a measurement of pass@1."""

ONCE = IterationSampling(maximum=1)


class World:
    """What all arms of all seeds share: tokenizer, tasks, and the open sandbox.

    Args:
        workers: Programs that run at once.
    """

    def __init__(self, workers: int) -> None:
        self.tokenizer: PreTrainedTokenizerBase = rule_tokenizer()
        self.pad, self.end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        trained, held_out = rules(held_out=False), rules(held_out=True)
        prompts = TextEncoder(self.tokenizer).prompts([rule.words for rule in [*trained, *held_out]])
        self.trained, self.n_trained = prompts[: len(trained)], len(trained)
        self.held_out = PromptBatches(prompts[len(trained) :], len(held_out), self.pad, first=len(trained))
        tasks = [rule.task() for rule in [*trained, *held_out]]
        self.reward = ProgramReward(tasks, self.tokenizer, [self.end], workers=workers)

    def new_model(self, seed: int) -> MullForCausalLM:
        """A small Qwen3."""
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(self.tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=64,
            pad_token_id=self.pad,
            bos_token_id=None,
            eos_token_id=self.end,
        )
        return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), None)

    def start(self, seed: int, steps: int) -> MullForCausalLM:
        """A model that imitates partly wrong demonstrations."""
        model = self.new_model(seed)
        rows = pack_examples(
            demonstrations(8192, wrong=WRONG, seed=seed), self.tokenizer, length=LENGTH, vocab_size=len(self.tokenizer)
        )
        config = TrainConfig(
            steps=steps,
            optimizer="muon",
            peak_lr=3e-3,
            schedule="wsd",
            decay_share=0.5,
            precision="fp32",
            seed=seed,
        )
        train(model, NextToken(ONCE), ShuffledBatches(rows, 64, seed), config)
        return model

    def reinforced(self, model: MullForCausalLM, reward: Reward, seed: int, steps: int) -> list[dict[str, Any]]:
        """Train on rewards; the records of the steps."""
        grpo = GroupRelative(
            GRPOConfig(group_size=ANSWERS, max_new_tokens=MAX_NEW_TOKENS), reward, [self.end], self.pad
        )
        config = TrainConfig(
            steps=steps,
            peak_lr=3e-4,
            schedule="constant",
            warmup_steps=5,
            weight_decay=0.0,
            precision="fp32",
            seed=seed,
            log_every=1,
        )
        batches = PromptBatches(self.trained, PROMPTS, self.pad, seed=seed)
        return train(model, WeightedMTP(grpo, ONCE, seed=seed), batches, config).history

    def measured(self, model: MullForCausalLM) -> dict[str, float]:
        """pass@1 on tasks that nothing was trained on, sampled and greedy."""
        found = {}
        for name, temperature, samples in (("sampled", 1.0, SAMPLES), ("greedy", 1e-4, 1)):
            rates = pass_rates(
                model.eval(),
                self.held_out,
                self.reward,
                rows=len(self.held_out),
                end_ids=[self.end],
                pad_id=self.pad,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=temperature,
                samples=samples,
                seed=1,
            )
            found[name] = rates.pass_at_1
        return found


class Shuffled:
    """The rewards of a batch in another order.

    Args:
        reward: Grades the answers.
        seed: Of the order.
    """

    def __init__(self, reward: ProgramReward, seed: int) -> None:
        self.reward = reward
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, completions: Tensor, batch: Batch) -> Graded:
        """Grade completions ``[N, L]``, and give their rewards to others."""
        graded = self.reward(completions, batch)
        order = torch.randperm(len(graded.rewards), generator=self.generator)
        return graded._replace(rewards=graded.rewards[order])


def experiment(world: World, seed: int, warmup: int, steps: int) -> dict[str, Any]:
    """pass@1 of one seed: at the start, and after training on rewards and on shuffled rewards."""
    start = world.start(seed, warmup)
    found: dict[str, Any] = {"seed": seed, "start": world.measured(start)}
    for name, reward in (("rewarded", world.reward), ("shuffled", Shuffled(world.reward, seed))):
        model = copy.deepcopy(start)
        history = world.reinforced(model, reward, seed, steps)
        found[name] = world.measured(model)
        found[f"{name}_steps"] = {
            "first_reward": history[0]["reward"],
            "last_reward": history[-1]["reward"],
            "timeouts": sum(record["timeouts"] for record in history) * PROMPTS * ANSWERS,
            "errors": statistics.mean(record["errors"] for record in history),
            "equal_groups": statistics.mean(record["equal_groups"] for record in history),
            "rollout_seconds": statistics.mean(record["rollout_seconds"] for record in history),
            "grading_seconds": statistics.mean(record["grading_seconds"] for record in history),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all seeds, print a line for each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin, processor = time.perf_counter(), time.process_time()
    world, found = World(given.workers), []
    with world.reward:
        for seed in range(given.seeds):
            found.append(experiment(world, seed, given.warmup, given.steps))
            rates = {name: found[-1][name] for name in ("start", "rewarded", "shuffled")}
            print(f"seed {seed}: pass@1 {rates}", flush=True)
    report = {
        **header("cpu"),
        "warmup": given.warmup,
        "steps": given.steps,
        "wrong_demonstrations": WRONG,
        "held_out_tasks": len(world.held_out),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "programs_run": dict(world.reward.reasons),
        "seeds": found,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
