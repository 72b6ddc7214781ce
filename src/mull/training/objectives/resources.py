"""What objectives are built from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.training.objectives.base import Batch
from mull.training.objectives.iterations import IterationSampling

Reward = Callable[[Tensor, Batch], Tensor]
"""``(completions [N, L], batch) -> rewards [N]``. Completions include the end token and the padding after it. The batch is
that of the data with every row repeated for its samples, so it can carry what grading needs: answers, or numbers of problems that
the callable looks up. A reward that reads text owns the tokenizer to decode with."""


class Settings(BaseModel):
    """Settings of an objective; also its section in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sources: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where something comes from. A resumed run may change them, so no checkpoint compares them."""


ONCE = IterationSampling(maximum=1)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Models, data and graders; each objective takes what it needs."""

    model: MullForCausalLM
    """The model that will be trained."""

    iterations: IterationSampling = ONCE
    """Think iterations of a step."""

    reference: MullForCausalLM | None = None
    """For ``rho1-wmtp``, and for ``grpo-wmtp`` with a penalty: a frozen model in evaluation mode, on the model's device, with the
    model's tokenizer."""

    n_tokens: int | None = None
    """Tokens of the tokenizer that model and reference are known to share. Their vocabularies may be larger, each padded to its
    own size. None if nobody has compared the tokenizers: the sizes must be equal then."""

    value_head: ValueHead | None = None
    """For ``value-head`` and ``critic-wmtp``, which needs a trained one."""

    held_out: Callable[[int], Batch] | None = None
    """For ``gradient-wmtp`` by alignment: function from the number of a held-out batch to the batch."""

    reward: Reward | None = None
    """For ``grpo-wmtp``: grades sampled answers."""

    end_ids: Sequence[int] = ()
    """For ``grpo-wmtp``: tokens that end an answer."""

    pad_id: int = 0
    """For ``grpo-wmtp``: fills rows after their end."""
