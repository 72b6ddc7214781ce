"""Value head: predicts the outcome of a document from its hidden states.

Shapes: B batch, T tokens, D model width.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHead(nn.Module):
    """``V = out(silu(inner(h)))``, one number per token: the expected outcome given the document up to and including that token.

    The last layer, and with it every value, starts at zero. The head computes in fp32 (fp64 if its weights are) whatever autocast
    and the dtype of its weights: a token's credit is the difference of two neighbouring values, which bf16 would round away.

    Args:
        width: Model width D, at least 2; the inner layer is half as wide.

    Raises:
        ValueError: `width` is smaller than 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width={width} must be at least 2: the inner layer is half as wide.")
        self.inner = nn.Linear(width, width // 2)
        self.out = nn.Linear(width // 2, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
        """Estimate the outcome at every token."""
        dtype = torch.promote_types(self.out.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden.to(dtype), self.inner.weight.to(dtype), self.inner.bias.to(dtype))
            return F.linear(F.silu(inner), self.out.weight.to(dtype), self.out.bias.to(dtype))[..., 0]


def value_loss(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Squared error of the values, summed over the targets: ``Σ_j (V(s_j) - G_j)²`` with ``V(s_j) = values[j - 1]``.

    Args:
        values: ``values[b, i]``: estimate after token ``i``.
        returns: ``returns[b, j]``: the right value before token ``j`` (`mull.ops.token_weights.lambda_returns`).
        valid: True at the targets (`mull.ops.targets.valid_tokens`).

    Returns:
        The sum, differentiable with respect to `values` only. Divide it by the number of targets for the mean.
    """
    error = values[:, :-1] - returns[:, 1:].detach()
    return torch.where(valid[:, 1:], error, 0).square().sum()
