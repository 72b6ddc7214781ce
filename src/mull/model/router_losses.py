"""What routers of experts, which a backbone has, add to the loss of training.

Shapes: N tokens, E experts.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def router_losses(
    backbone: PreTrainedModel,
    config: PreTrainedConfig,
    router_logits: Sequence[Tensor],
    attention_mask: Tensor | dict[str, Any] | None = None,
) -> dict[str, tuple[float, Tensor]]:
    """The coefficient and the value of each term, by name.

    ``balancing_loss``, with ``router_aux_loss_coef`` of the configuration: how unevenly routers use their experts
    (arXiv:2101.03961, equations 4 to 6), computed by the backbone's own function. ``router_z_loss``, with ``router_z_loss_coef``
    where the configuration has one: the mean square of ``logsumexp`` of a router's logits, which keeps them small
    (arXiv:2202.08906, equation 5).

    Args:
        backbone: Says which function of transformers computes the balance.
        config: Of the backbone.
        router_logits: ``[N, E]`` from `MullModel.router_logits`: every visit counts, so looped layers count more often.
        attention_mask: ``[B, T]``: padding is left out. Masks of other forms leave nothing out.
    """
    modeling: Any = importlib.import_module(type(backbone).__module__)
    is_padding = isinstance(attention_mask, Tensor) and attention_mask.numel() == len(router_logits[0])
    mask: Any = attention_mask if is_padding else None
    experts, chosen = config.num_experts, config.num_experts_per_tok
    balance: Tensor = modeling.load_balancing_loss_func(tuple(router_logits), experts, chosen, mask)
    terms: dict[str, tuple[float, Tensor]] = {"balancing_loss": (config.router_aux_loss_coef, balance)}
    if coefficient := getattr(config, "router_z_loss_coef", 0.0):
        squares = torch.stack([logits.float().logsumexp(-1).square() for logits in router_logits])
        real = torch.ones_like(squares[0]) if mask is None else mask.flatten().to(squares)
        terms["router_z_loss"] = coefficient, (squares * real).sum() / (real.sum() * len(squares))
    return terms
