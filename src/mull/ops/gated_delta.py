"""The gated delta rule's state: replaying recorded inputs, so that rejected tokens can be taken back exactly.

Shapes: B batch, T tokens, H value heads, G key heads (G divides H), K key width, V value width.

The rule itself runs in transformers' layers. A state cannot be cropped, but it can be recomputed: the layer's inputs to the
rule are enough, no projection and no weight is touched.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t k_t v_t^T          (arXiv:2412.06464, equation 10)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

L2_NORM_EPSILON = 1e-6
"""What the layers of transformers add under the square root when they normalise keys."""


def no_op_where_inactive(
    g: Float[Tensor, "B T H"], beta: Float[Tensor, "B T H"], active: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
    """Make the rule skip tokens: without decay (g = 0) and without update (beta = 0) the state passes unchanged.

    Args:
        g: Decay in log space, at most 0.
        beta: Write strength.
        active: True where the token counts.
    """
    return g * active[..., None], beta * active[..., None]


def replay_state(
    state: Float[Tensor, "B H K V"],
    key: Float[Tensor, "B T G K"],
    value: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
) -> Float[Tensor, "B H K V"]:
    """Advance a recurrent state over recorded inputs.

    Args:
        state: State before the first token. Its precision is that of the computation; transformers keeps it in fp32.
        key: Keys before normalisation, as the layer passes them to the rule.
        value: Values.
        g: Decay in log space, at most 0.
        beta: Write strength.

    Returns:
        State after the last token. Equal to what transformers' recurrent rule returns, up to the order of summation.
    """
    key, value, g, beta = (tensor.to(state.dtype) for tensor in (key, value, g, beta))
    key = key * torch.rsqrt(key.pow(2).sum(-1, keepdim=True) + L2_NORM_EPSILON)
    key = key.repeat_interleave(value.shape[2] // key.shape[2], dim=2)  # (B, T, H, K)
    decay = g.exp()
    for t in range(key.shape[1]):
        k_t = key[:, t]
        state = state * decay[:, t, :, None, None]
        remembered = torch.einsum("bhkv,bhk->bhv", state, k_t)
        delta = (value[:, t] - remembered) * beta[:, t, :, None]
        state = state + k_t[..., None] * delta[..., None, :]
    return state
