"""What grades an answer."""

from typing import TYPE_CHECKING

from torch import Tensor

from mull.data.arithmetic import ArithmeticTask
from mull.training.objectives.base import Batch
from mull.training.objectives.grpo import Reward

if TYPE_CHECKING:
    pass


def arithmetic_reward(completions: Tensor, batch: Batch) -> Tensor:
    """1 for the exact answer and its end, else 0; grades the batches of `mull.data.arithmetic.ArithmeticTask.prompts`.

    Raises:
        ValueError: the batch has no answers.
    """
    if "answers" not in batch:
        raise ValueError(
            f"The reward 'arithmetic' compares with answers, and the batch holds {', '.join(sorted(batch))}: use the prompts of "
            "an arithmetic task."
        )
    return ArithmeticTask().reward(completions, batch)


REWARDS: dict[str, Reward] = {"arithmetic": arithmetic_reward}
"""Name of a reward to its function, for recipes."""
