"""How far the predictions of a hybrid are from those of the softmax model that it was made from.

Shapes: B rows of a batch, R rows in all, T tokens, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import log
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mull.retrofit.calibrate import DeltaMixer, delta_config, delta_mixer, mixers_in_place
from mull.retrofit.hybrid import DeltaStart
from mull.runtime.progress import Progress

TOKENS_AT_ONCE = 256
"""Tokens whose distributions over the vocabulary are held at a time."""


class StartDivergence(BaseModel):
    """How far one start of the converted layers is from the teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str
    """Which start; ``uniform`` is the predictor that knows nothing."""

    divergence: float
    """``KL(teacher || student)`` in nats per token."""

    standard_error: float | None
    """Over rows; None for a single row."""


def row_divergences(
    expected: Float[Tensor, "B T D"],
    found: Float[Tensor, "B T D"],
    teacher_head: nn.Module,
    student_head: nn.Module | None = None,
) -> Float[Tensor, " B"]:
    """``KL(teacher || student)`` in nats per token, by row, in fp64 on the CPU. Gradients pass.

    Args:
        expected: Final states of the teacher, after its last norm.
        found: Those of the student.
        teacher_head: Turns states into logits.
        student_head: That of the student; default: the teacher's.
    """
    student_head = student_head or teacher_head
    parts = []
    for ours, theirs in zip(
        expected.flatten(0, 1).split(TOKENS_AT_ONCE), found.flatten(0, 1).split(TOKENS_AT_ONCE), strict=True
    ):
        teacher = teacher_head(ours).float().log_softmax(-1)
        student = student_head(theirs).float().log_softmax(-1)
        parts.append((teacher.exp() * (teacher - student)).sum(-1))
    return torch.cat(parts).cpu().double().view(expected.shape[:2]).mean(1)


@torch.no_grad()
def model_divergences(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Tensor]
) -> Float[Tensor, " R"]:
    """`row_divergences` of two models on token numbers ``[B, T]`` without padding; a row is read as one text."""
    found = []
    for batch in batches:
        expected, given = final_states(teacher, batch), final_states(student, batch)
        found.append(row_divergences(expected, given.to(expected.device), teacher.lm_head, student.lm_head))
    return torch.cat(found)


def final_states(model: PreTrainedModel, batch: Tensor) -> Float[Tensor, "B T D"]:
    """States after the last norm."""
    states: Tensor = model.model(batch.to(model.device), use_cache=False)[0]
    return states


@torch.no_grad()
def step_zero(
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    starts: Mapping[str, Mapping[int, DeltaStart]],
    *,
    progress: bool = True,
) -> list[StartDivergence]:
    """What a hybrid predicts before any training, by the start of its DeltaNet layers.

    Args:
        teacher: The softmax model; it is not changed.
        batches: Token numbers ``[B, T]`` of held-out text without padding: not that of the calibration.
        starts: Measured starts by name, each by layer. All have the same layers.
        progress: Show on stderr how far it is.

    Returns:
        The given starts; ``zero output``, whose converted layers add nothing; ``copy only``, transformers' random start with the
        source's maps of queries, keys, values and outputs; and ``uniform``.
    """
    layers: Any = teacher.model.layers
    config = teacher.config.get_text_config()
    converted = next(iter(starts.values())).keys()

    def hybrid(mixer: Callable[[int], nn.Module]) -> AbstractContextManager[None]:
        return mixers_in_place(layers, {number: mixer(number) for number in converted})

    arms: dict[str, Callable[[int], nn.Module]] = {
        name: lambda number, given=given: delta_mixer(layers[number], config, given[number])  # type: ignore[misc]
        for name, given in starts.items()
    }
    arms |= {"zero output": lambda _: Silent(), "copy only": lambda number: copied_mixer(layers[number], config)}
    found: dict[str, list[Tensor]] = {}
    expected = [final_states(teacher, batch) for batch in batches]
    with Progress(len(arms) * len(batches), "batch", label="step 0", shown=progress) as bar:
        for name, mixer in arms.items():
            with hybrid(mixer):
                for batch, states in zip(batches, expected, strict=True):
                    found.setdefault(name, []).append(
                        row_divergences(states, final_states(teacher, batch), teacher.lm_head)
                    )
                    bar.advance()
    found["uniform"] = [uniform_divergences(states, teacher.lm_head) for states in expected]
    return [_summary(name, torch.cat(parts)) for name, parts in found.items()]


def uniform_divergences(expected: Float[Tensor, "B T D"], head: nn.Module) -> Float[Tensor, " B"]:
    """``KL(teacher || uniform)`` in nats per token, by row: ``log V`` less the teacher's entropy."""
    parts = []
    for states in expected.flatten(0, 1).split(TOKENS_AT_ONCE):
        teacher = head(states).float().log_softmax(-1)
        parts.append(log(teacher.shape[-1]) + (teacher.exp() * teacher).sum(-1))
    return torch.cat(parts).cpu().double().view(expected.shape[:2]).mean(1)


def _summary(name: str, rows: Float[Tensor, " R"]) -> StartDivergence:
    error = rows.std().item() / len(rows) ** 0.5 if len(rows) > 1 else None
    return StartDivergence(start=name, divergence=rows.mean().item(), standard_error=error)


class Silent(nn.Module):
    """In the place of a mixer: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Zeros, and no attention weights."""
        return torch.zeros_like(hidden_states), None


def copied_mixer(layer: Any, config: Any) -> DeltaMixer:
    """DeltaNet as transformers initialises it, with the source's maps of queries, keys, values and outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = delta_config(config)
        fresh: Any = AutoModelForCausalLM.from_config(target).model.layers[0].linear_attn
    copied = delta_mixer(layer, config, DeltaStart())
    tensors = copied.net.state_dict()
    kept = {name: value.clone() for name, value in tensors.items() if name in ("in_proj_qkv.weight", "out_proj.weight")}
    copied.net.load_state_dict({**fresh.to(kept["out_proj.weight"]).state_dict(), **kept}, assign=True)
    return copied
