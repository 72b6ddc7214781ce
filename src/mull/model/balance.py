"""Choices whose load a bias keeps even, outside of the gradient.

Shapes: N tokens, C alternatives.
"""

import torch
from torch import Tensor
from transformers import initialization as init

from mull.model.warmup import WarmedUp
from mull.runtime.distributed import global_sum


class BalancedChoice(WarmedUp):
    """A choice among alternatives by scores plus a bias, which counts for the choice and for nothing else.

    Every optimizer step raises the bias of alternatives with less than the mean load, and lowers that of the others. The load are
    the tokens of all training passes since the last step, on all ranks.

    Args:
        n_choices: C.
        rate: Step of the bias; 0 leaves it as it is.
        warmup_steps: See `WarmedUp`.

    Source:
        Loss-free balancing (arXiv:2408.15664).
    """

    bias: Tensor
    """``[C]``."""

    in_fp32 = ("bias",)

    def __init__(self, n_choices: int, rate: float, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.register_buffer("bias", torch.zeros(n_choices, dtype=torch.float32))
        self._rate = rate
        self._load: Tensor | int = 0
        self._selections: Tensor | int = 0
        self._by_hand = False

    def start_anew(self) -> None:
        """Begin the warm-up without bias."""
        super().start_anew()
        init.zeros_(self.bias)

    def count(self, chosen: Tensor, training: bool) -> None:
        """Add to the statistics, and in training to the load: the alternatives ``[N]`` that tokens chose."""
        selections = chosen.bincount(minlength=len(self.bias))
        self._selections = selections + self._selections
        if training:
            self._load = selections + self._load

    @property
    def selections(self) -> list[int]:
        """Tokens of each alternative since `reset_stats`."""
        return [0] * len(self.bias) if isinstance(self._selections, int) else self._selections.tolist()

    def reset_stats(self) -> None:
        """Forget what was counted, but not the load of the step."""
        self._selections = 0

    def end_step(self) -> None:
        """Even the load, unless the caller does."""
        super().end_step()
        if not self._by_hand and self._rate:
            self._update_bias(self._rate)

    def update_bias(self, rate: float) -> None:
        """Even the load once, and leave it to the caller from now on."""
        self._by_hand = True
        self._update_bias(rate)

    @torch.no_grad()
    def _update_bias(self, rate: float) -> None:
        load = self._load
        if isinstance(load, int):
            load = torch.zeros(len(self.bias), device=self.bias.device, dtype=torch.long)
        total = global_sum(load.to(self.bias.device)).float()
        self.bias += rate * (total.mean() - total).sign()
        self._load = 0
