"""Claim: from the reward of its own answers a model learns what its demonstrations leave open, and not from shuffled advantages.

Of the demonstrations of two-digit addition, 60 % are wrong by one in the last digit: a model that imitates them perfectly is
right 40 % of the time, and its most likely answer is wrong. Measured on operands that nothing was trained on
(docs/papers/grpo.md); the bounds leave room below the worst of three seeds.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from mull.data.arithmetic import ArithmeticTask
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.decoding.rollouts import rollouts
from mull.evaluation.rewards import REWARDS
from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives.grpo import GroupRelative, GRPOConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.weighted_mtp import Control, WeightedMTP

TASK = ArithmeticTask(digits=2, operations="+")
ONCE = IterationSampling(maximum=1)
WRONG = 0.6


def small_model(seed: int) -> MullForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=TASK.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=TASK.pad_id,
        bos_token_id=None,
        eos_token_id=TASK.eos_id,
    )
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), None)


def mixed_demonstrations(seed: int) -> PackedDataset:
    """Demonstrations whose last digit is one too high in a share of the answers."""
    right = TASK.demonstrations(8192, length=TASK.prompt_length + TASK.answer_length)
    ids, labels = right.input_ids.clone(), right.labels.clone()
    rows, ends = (labels == TASK.eos_id).nonzero(as_tuple=True)
    wrong = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < WRONG
    rows, last = rows[wrong], ends[wrong] - 1
    ids[rows, last] = labels[rows, last] = (ids[rows, last] + 1) % 10
    return replace(right, input_ids=ids, labels=labels)


def exact_answers(model: MullForCausalLM, temperature: float) -> float:
    """Share of right answers to 1,024 questions about held-out operands."""
    batch = TASK.prompts(0, 1024, train=False)
    completions = rollouts(
        model.eval(),
        batch["input_ids"],
        batch["attention_mask"],
        seeds=range(1024),
        end_ids=[TASK.eos_id],
        pad_id=TASK.pad_id,
        max_new_tokens=TASK.answer_length,
        temperature=temperature,
    )
    return float(TASK.reward(completions, batch).mean())


def rates(model: MullForCausalLM) -> tuple[float, float]:
    """Right answers when the most likely token is taken, and when answers are sampled."""
    return exact_answers(model, 1e-4), exact_answers(model, 1.0)


def reinforced(model: MullForCausalLM, seed: int, control: Control) -> tuple[float, float]:
    config = GRPOConfig(group_size=8, max_new_tokens=TASK.answer_length)
    scorer = GroupRelative(config, REWARDS["arithmetic"](TASK), [TASK.eos_id], TASK.pad_id)
    train(
        model,
        WeightedMTP(scorer, ONCE, control=control, seed=seed),
        lambda number: TASK.prompts(1_000 * seed + number, 32),
        TrainConfig(
            steps=50,
            peak_lr=3e-4,
            schedule="constant",
            warmup_steps=5,
            weight_decay=0.0,
            precision="fp32",
            seed=seed,
        ),
    )
    return rates(model)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_teach_what_demonstrations_leave_open_and_shuffled_advantages_do_not(seed: int) -> None:
    model = small_model(seed)
    warmup = TrainConfig(
        steps=300,
        optimizer="muon",
        peak_lr=3e-3,
        schedule="wsd",
        decay_share=0.5,
        precision="fp32",
        seed=seed,
    )
    train(model, NextToken(ONCE), ShuffledBatches(mixed_demonstrations(seed), 64, seed), warmup)
    before = rates(model)
    warm = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    treated = reinforced(model, seed, "none")
    model.load_state_dict(warm)
    control = reinforced(model, seed, "shuffled")
    print(f"seed {seed}: right greedily and sampled: before {before}, trained {treated}, control {control}")
    assert before[0] < 0.45
    assert treated[0] > before[0] + 0.3
    assert treated[1] > before[1] + 0.1
    assert control[0] < before[0] + 0.05
    assert control[1] < before[1] + 0.02
