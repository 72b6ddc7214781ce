"""Where two greedy texts of one model first differ, and whether rounding explains it.

Kernels round differently for one token than for several. In fp32 that almost never changes which logit is the largest. In bf16,
whose numbers have 8 significant bits, the two largest logits are sometimes equal to the last bit, and then a text that was
decoded in other portions may continue with the other token. Such a tie is a property of the model and its precision, but it has
to be shown for each difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Difference:
    """The first difference of a text from the reference."""

    row: int
    """Index of the text."""

    position: int
    """Index of its first token that differs, counted from the first new one."""

    gap: float
    """Difference between the logits of the two tokens, computed in the wider precision."""

    rounding: float
    """Largest rounding error of a logit at this position: own precision against the wider one."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains the difference: it can raise one logit and lower the other."""
        return self.gap <= 2 * self.rounding


@torch.no_grad()
def differences(
    model: PreTrainedModel,
    wider: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    **options: Any,
) -> list[Difference]:
    """Find the first difference of each text, and measure it.

    Args:
        model: The model that wrote the texts, of transformers or mull.
        wider: The same weights in a wider precision.
        prompts: Tokens that each text continues.
        reference: New tokens of each text.
        texts: New tokens to compare with them.
        options: Arguments of the forward pass, such as ``think_iterations``.

    Returns:
        One difference for each row that has one. If one text is a prefix of the other, they do not differ.
    """
    found = []
    for row, (prompt, expected, actual) in enumerate(zip(prompts, reference, texts, strict=True)):
        pairs = enumerate(zip(expected, actual, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), None)
        if place is None:
            continue
        text = torch.tensor([[*prompt, *expected[:place]]], device=model.device)
        own, exact = (each(text, use_cache=False, **options).logits[0].double() for each in (model, wider))
        gap = (exact[-1, expected[place]] - exact[-1, actual[place]]).abs()
        found.append(Difference(row, place, gap.item(), (own - exact)[-1].abs().max().item()))
    return found
