"""Training of a recursive head with the keys that it sees in decoding.

Decoding drafts from position ``i`` in steps. Step 1 reads the true state of every position up to ``i`` and stores their keys.
Step k is at position ``i + k - 1``. It reads what step ``k - 1`` wrote. It attends to the keys of step 1 up to ``i`` and those of
steps 2 to k of its own chain. In training, every position begins a chain, and all chains take a step together.

The mask is that of EAGLE-3's training-time test (arXiv:2503.01840). FastMTP (arXiv:2509.18362) instead attends to the states of
step k at all positions, which decoding never has.

Shapes: B batch, T tokens, D model width, H heads of keys, W their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

IMPLEMENTATIONS = ("sdpa", "eager")
"""Implementations of attention that accept an arbitrary mask."""


class StepKeys:
    """The cache that a recursive head's decoder layer sees in step k: keys and values of earlier steps.

    A call does not change what the next call returns, so gradient checkpointing may run the layer again.

    Args:
        past: Keys and values of steps 1 to ``k - 1``, ``[B, H, (k - 1) * T, W]`` each; None in step 1.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        self.past = past
        self.present: tuple[Tensor, Tensor] | None = None
        """Keys and values of steps 1 to k, once the layer has run."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the step's keys and values, ``[B, H, T, W]`` each, to those of earlier steps; return all."""
        present = (key_states, value_states)
        if self.past is not None:
            present = (torch.cat([self.past[0], key_states], 2), torch.cat([self.past[1], value_states], 2))
        self.present = self.present or present
        return present


class ChainedSteps:
    """The `mull.layers.heads.RunBlock` of recursive heads in training. Make one per call, and run its steps in order.

    Args:
        mask: The call's mask in the backbone's full attention: boolean or additive, ``[B or 1, 1, T, T]``, or None for plain
            causality.
        position_ids: ``[B or 1, T]``.
        rotary: Computes position embeddings from position ids.
        implementation: Name of the backbone's implementation of attention.

    Raises:
        ValueError: an implementation that does not accept such a mask.
    """

    def __init__(
        self, mask: Any, position_ids: Tensor, rotary: Callable[[Tensor], Any], implementation: str | None
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"Recursive heads (native, or sequential with share_weights_across_steps) train with a mask that "
                f"attn_implementation={implementation!r} does not support. Load the model with attn_implementation='sdpa' or "
                "'eager'."
            )
        self._mask = mask
        self._position_ids = position_ids
        self._rotary = rotary
        self._additive = implementation == "eager"
        self._keys: tuple[Tensor, Tensor] | None = None

    def __call__(self, block: Any, h: Tensor, k: int) -> Tensor:
        """Run step k of all chains through a head's decoder layer: states ``[B, T, D]``."""
        view = StepKeys(None if k == 1 else self._keys)
        # Otherwise transformers drops any cache under gradient checkpointing. This one is safe to use twice.
        block._can_checkpoint_with_cache = True
        position_ids = self._position_ids + (k - 1)
        out: Tensor = block(
            h,
            attention_mask=self._mask if k == 1 else self._step_mask(h, k),
            position_ids=position_ids,
            past_key_values=view,
            use_cache=False,
            position_embeddings=self._rotary(position_ids),
        )
        self._keys = view.present
        return out

    def _step_mask(self, h: Tensor, k: int) -> Tensor:
        n_tokens = h.shape[1]
        mask = self._mask
        if mask is None:
            mask = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool, device=h.device).tril()
        visible = chain_mask(mask if mask.dtype == torch.bool else mask == 0, k)
        if not self._additive:
            return visible
        return torch.zeros_like(visible, dtype=h.dtype).masked_fill(~visible, torch.finfo(h.dtype).min)


def chain_mask(first: Bool[Tensor, "B 1 T T"], k: int) -> Bool[Tensor, "B 1 T K"]:
    """Mask of step k over the keys of steps 1 to k, ``K = k * T``: step 1's own mask, then only the step's own chain.

    Args:
        first: Mask of step 1 over its own keys.
        k: Number of the step.
    """
    own = torch.eye(first.shape[-1], dtype=torch.bool, device=first.device).expand_as(first)
    return torch.cat([first, *[own] * (k - 1)], -1)
