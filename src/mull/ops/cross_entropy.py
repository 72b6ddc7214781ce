"""Cross-entropy of a vocabulary projection, in bounded memory.

Shapes: N targets, D model width, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

CHUNK_ABOVE = 2**24
"""Logits (``N · V``) above which the chunked kernel runs. Below, at most 64 MiB in fp32, materialised logits are faster."""


def token_losses(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, " N"]:
    """Cross-entropy in nats of every target, ``-log softmax(hidden · weightᵀ + bias)[target]``.

    A large product runs in torch's chunked kernel, which never holds all logits. The kernel ignores autocast and would
    fall back to fp32 matrix products, so its operands are cast here.

    Args:
        hidden: Final-normed hidden states, one row per target.
        weight: Unembedding matrix.
        targets: Vocabulary indices; drop ignored positions before the call, they would only cost time.
        bias: Bias of the unembedding.

    Returns:
        One fp32 loss per target. With bf16 operands of the chunked kernel each is rounded to 8 significant bits. The
        rounding averages out in a sum over targets (4e-5 relative over 2048 of them), which is why the kernel's own
        ``reduction="sum"``, itself rounded to bf16 (2e-3 relative), is not used.
    """
    if len(targets) * len(weight) <= CHUNK_ABOVE:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    losses = F.linear_cross_entropy(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        linear_bias=None if bias is None else bias.to(dtype),
        reduction="none",
        options=LinearCrossEntropyOptions(),
    )
    return losses.float()
