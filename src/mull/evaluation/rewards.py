"""Grade sampled answers: as a reward in training, and as an evaluation."""

from collections.abc import Callable

from torch import Tensor

from mull.data.arithmetic import ArithmeticTask
from mull.decoding.rollouts import rollouts
from mull.evaluation.program_reward import ProgramReward
from mull.model.causal_lm import MullForCausalLM
from mull.training.objectives.base import Batch
from mull.training.objectives.resources import Reward


def arithmetic_reward(task: ArithmeticTask) -> Reward:
    """Reward of 1 for the exact answer followed by its end, else 0; for batches of `ArithmeticTask.prompts`."""

    def reward(completions: Tensor, batch: Batch) -> Tensor:
        if "answers" not in batch:
            raise ValueError(
                f"The reward 'arithmetic' compares with answers, and the batch has {', '.join(sorted(batch))}: use the prompts "
                "of an arithmetic task."
            )
        return task.reward(completions, batch)

    return reward


REWARDS: dict[str, Callable[..., Reward]] = {"arithmetic": arithmetic_reward, "programs": ProgramReward}
"""Name of a reward in recipes to what makes it. That of ``programs`` is opened with ``with``."""


def right_answers(model: MullForCausalLM, task: ArithmeticTask, *, rows: int, iterations: int | None) -> float:
    """Share of right answers to held-out questions, sampled with the task's seed.

    With several ranks, all call this alike.

    Args:
        model: In evaluation mode.
        task: Which questions.
        rows: Number of questions, the first ones.
        iterations: Think iterations; None for a model without a think block.
    """
    batch = {name: tensor.to(model.device) for name, tensor in task.prompts(0, rows, train=False).items()}
    answers = rollouts(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        seeds=[task.seed + row for row in range(rows)],
        end_ids=[task.eos_id],
        pad_id=task.pad_id,
        max_new_tokens=task.answer_length,
        iterations=iterations,
    )
    return float(task.reward(answers, batch).mean())
