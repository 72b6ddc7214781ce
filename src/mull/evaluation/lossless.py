"""Where two texts of one model part, and whether rounding explains it.

Kernels round differently for one token than for several. In fp32 that almost never changes which logit is the largest; in bf16,
whose numbers have 8 significant bits, the two largest are now and then equal to the last digit, and then a text may part from
another that was decoded in other portions. Such a tie is a property of the model and its precision: what is needed is evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Difference:
    """Where a text first parts from the reference."""

    row: int
    """Number of the text."""

    position: int
    """Number of its first token that differs, counted from the first new one."""

    gap: float
    """Between the logits of the two tokens, computed in the wider precision."""

    rounding: float
    """Largest difference that the model's own precision makes to a logit at this place."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains the difference: it may raise one logit and lower the other."""
        return self.gap <= 2 * self.rounding


@torch.no_grad()
def differences(
    model: Any,
    wider: Any,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    **options: Any,
) -> list[Difference]:
    """Find the first difference of each text, and measure it.

    Args:
        model: What wrote the texts, of transformers or mull.
        wider: The same weights in a wider precision.
        prompts: Tokens that each text continues.
        reference: New tokens of each text.
        texts: New tokens to compare with them.
        options: Arguments of the forward pass, such as ``think_iterations``.

    Returns:
        One difference for each row that has one. A row that is a beginning of the other has none.
    """
    found = []
    for row, (prompt, expected, actual) in enumerate(zip(prompts, reference, texts, strict=True)):
        parting = [place for place, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]]
        if not parting:
            continue
        place = parting[0]
        text = torch.tensor([[*prompt, *expected[:place]]], device=model.device)
        own, exact = (each(text, use_cache=False, **options).logits[0].double() for each in (model, wider))
        gap = (exact[-1, expected[place]] - exact[-1, actual[place]]).abs()
        found.append(Difference(row, place, gap.item(), (own - exact)[-1].abs().max().item()))
    return found
