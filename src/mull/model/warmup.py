"""Parts of a model that behave differently in their first optimizer steps."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import initialization as init

_COUNTED: "WeakSet[WarmedUp]" = WeakSet()


class WarmedUp(nn.Module):
    """Counts the optimizer steps that train it, and keeps the count with its weights.

    Args:
        warmup_steps: How many of them are its warm-up.
    """

    n_steps: Tensor

    def __init__(self, warmup_steps: int) -> None:
        super().__init__()
        self.warmup_steps = warmup_steps
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))
        _COUNTED.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also count the steps of a copy."""
        super().__setstate__(state)
        _COUNTED.add(self)

    def start_anew(self) -> None:
        """Begin the warm-up."""
        init.zeros_(self.n_steps)

    @property
    def warms_up(self) -> bool:
        """Whether the warm-up goes on."""
        return bool(self.n_steps < self.warmup_steps)

    def end_warm_up(self) -> None:
        """End it before its time."""
        self.n_steps.clamp_(min=self.warmup_steps)

    def counted_parameters(self) -> Iterable[nn.Parameter]:
        """An optimizer of the first of these that is trained makes the steps."""
        return self.parameters()

    def end_step(self) -> None:
        """An optimizer step that trained this module has ended."""
        self.n_steps += 1


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    for part in _COUNTED:
        # Several optimizers may share a module, for instance Muon and AdamW: one of them has the first parameter.
        first = next((parameter for parameter in part.counted_parameters() if parameter.requires_grad), None)
        if any(parameter is first for group in optimizer.param_groups for parameter in group["params"]):
            part.end_step()


# Every training loop calls its optimizer, and none of them would know that parts of the model have a warm-up.
register_optimizer_step_post_hook(_count_step)
