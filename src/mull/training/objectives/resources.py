"""What objectives are built from."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import ClassVar, Literal, NamedTuple

from pydantic import field_validator
from torch import Tensor, nn

from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.runtime.arguments import Frozen, require, require_callable, require_count
from mull.training.objectives.base import Batch
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.teacher_cache import TeacherCache


class Graded(NamedTuple):
    """What a reward found, if it says more than a number."""

    rewards: Tensor
    """``[N]``."""

    flags: Mapping[str, Tensor]
    """``[N]`` boolean by name, the same names in every call: what is true of an answer, such as that it timed out. A step logs
    which share of its answers has each."""


Reward = Callable[[Tensor, Batch], Tensor | Graded]
"""``(completions [N, L], batch) -> rewards [N]``, or `Graded`. Completions include the end token and the padding after it. The
batch is that of the data with every row repeated for its samples, so it can carry what grading needs: answers, or numbers of
tasks that the callable looks up. A reward that reads text owns the tokenizer to decode with."""


class Settings(Frozen):
    """Settings of an objective; also its section in a recipe."""

    sources: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where something comes from. A resumed run may change them, so no checkpoint compares them."""


class TeacherSource(Settings):
    """Where a teacher comes from."""

    sources = frozenset({"teacher", "device"})

    teacher: str
    """Directory or hub name of the teacher, which has the model's tokenizer."""

    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the teacher's weights; without it, that of the model. ``train.precision`` computes both alike."""

    device: str | None = None
    """Where the teacher runs, such as ``cuda:1`` or ``cpu``; without it, where the model does."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str | None) -> str | None:
        if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"{device!r} must be cpu, cuda, or one GPU such as cuda:1")
        return device


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
    model's tokenizer. For ``distill`` and ``align`` the teacher, which may be on another device."""

    predictions: TeacherCache | None = None
    """For ``distill``: what the teacher predicts for all rows of the data, instead of the teacher."""

    n_tokens: int | None = None
    """Tokens of the tokenizer that model and reference are known to share. Their vocabularies may be larger, each padded to its
    own size. None if nobody has compared the tokenizers: the sizes must be equal then."""

    value_head: ValueHead | None = None
    """For ``value-head`` and ``critic-wmtp``, which needs a trained one."""

    held_out: Callable[[int], Batch] | None = None
    """For ``gradient-wmtp`` by alignment: function from the number of a held-out batch to the batch."""

    route_labels: Tensor | None = None
    """For ``routing``: ``[N, L]``, the action of each layer in the training data's routes."""

    reward: Reward | None = None
    """For ``grpo-wmtp``: grades sampled answers."""

    end_ids: Sequence[int] = ()
    """For ``grpo-wmtp``: tokens that end an answer."""

    pad_id: int = 0
    """For ``grpo-wmtp``: fills rows after their end."""

    def __post_init__(self) -> None:
        """Refuse what an objective could not use.

        Raises:
            TypeError: a field of another type.
        """
        require("model", self.model, nn.Module, "a model of mull")
        require("iterations", self.iterations, IterationSampling, "an IterationSampling")
        require("reference", self.reference, (nn.Module, NoneType), "a model of mull, or None")
        require("predictions", self.predictions, (TeacherCache, NoneType), "a TeacherCache, or None")
        require("value_head", self.value_head, (nn.Module, NoneType), "a ValueHead, or None")
        require("route_labels", self.route_labels, (Tensor, NoneType), "a tensor [N, L], or None")
        for name in ("held_out", "reward"):
            if (given := getattr(self, name)) is not None:
                require_callable(name, given, "a function, or None")
        require("end_ids", self.end_ids, (list, tuple), "a list of token numbers")
        for token in self.end_ids:
            require("An entry of end_ids", token, int, "a token number")
        require_count("pad_id", self.pad_id, 0)
