"""A gate on what the heads of an attention give, before the output map puts them together.

Shapes: D model width, H heads, W width of a head.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class OutputGate(nn.Module):
    """``y · 2 σ(W x)`` for an attention's input x and its heads' outputs y. W starts at zero, so every factor is 1, exactly.

    Args:
        width: Model width D.
        n_heads: H.
        head_width: W.
        per_element: H · W gates instead of H.

    Raises:
        ValueError: in use, where only a part of the heads is there.

    Source:
        Gated attention (arXiv:2505.06708), gate G1, with ``σ(W x)``: half of ours. A model that is trained with the gate from the
        beginning need not start as another one.
    """

    def __init__(self, width: int, n_heads: int, head_width: int, per_element: bool) -> None:
        super().__init__()
        self.n_heads, self.head_width = n_heads, head_width
        n_gates = n_heads * head_width if per_element else n_heads
        # Not an `nn.Linear`, which adapters would replace, and `_init_weights` of transformers would start at random.
        self.weight = nn.Parameter(torch.empty(n_gates, width))
        self.start_open()

    def start_open(self) -> None:
        """Let everything through. The weights have a gradient from the first step on."""
        init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... D"], heads: Float[Tensor, "... HW"]) -> Float[Tensor, "... HW"]:
        """The outputs of the heads, gated."""
        expected = self.n_heads * self.head_width
        if heads.shape[-1] != expected:
            raise ValueError(
                f"Gates on attention need the outputs of all heads, and here are {heads.shape[-1]} of {expected} values: do not "
                "use tensor parallelism."
            )
        factor = 2 * F.linear(x, self.weight).sigmoid()
        by_head = heads.unflatten(-1, (self.n_heads, -1))
        # One factor per head, or one per element of it.
        gated = by_head * factor.to(heads).unflatten(-1, (self.n_heads, -1))
        return gated.flatten(-2)

    def attach(self, attention: nn.Module, output_map: str) -> None:
        """Gate an attention.

        Args:
            attention: A module of transformers, which is called with ``hidden_states``, its input.
            output_map: Name of the linear map in it that reads the heads' outputs. What has this name when the attention runs is
                gated as a whole, such as an adapter of PEFT that has replaced the map, or a quantized one.
        """
        # Inside of the layer, so they also run where gradient checkpointing runs it again.
        attention.register_forward_pre_hook(partial(self._begin, output_map), with_kwargs=True)
        attention.register_forward_hook(self._forget, always_call=True)

    def _begin(self, name: str, attention: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        output_map = attention.get_submodule(name)
        if self._gate not in output_map._forward_pre_hooks.values():
            # First: other hooks see what the map really reads.
            output_map.register_forward_pre_hook(self._gate, prepend=True)
        # A tuple, because a module among the attributes would become a submodule.
        self._running = output_map, arguments[0] if arguments else options["hidden_states"]

    def _gate(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert self._running is not None, "the output map runs inside of its attention"
        output_map, x = self._running
        if module is not output_map:  # it was the map, and is now a part of what has replaced it
            return None
        return self(x, arguments[0]), *arguments[1:]

    def _forget(self, *_: Any) -> None:
        self._running = None

    _running: tuple[nn.Module, Tensor] | None = None
    """The output map of the running attention, and the attention's input."""
