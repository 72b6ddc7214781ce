"""Token weights: how much each target counts in a loss.

Shapes: B batch, T tokens, H heads (head ``h`` at position ``i`` predicts token ``i + 1 + h``; head 0 is the next-token head),
G groups, S samples per group.

A *score* ``s[b, j]`` describes token ``j`` as a target, predicted from the tokens before it. A *weight* is indexed like the
prediction, ``w[b, i, h] = s[b, i + 1 + h]``, and 0 where that is no target. So every head weighs a token by the same score, which
the next-token model defines.

No gradient flows through a score or weight. Results are fp32, or fp64 if an operand is.
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mull.ops.targets import final_tokens, number_documents, upcoming_document

MAX_EXPONENT = 30.0
"""Bound of an exponent before ``exp``: squares of e^30 = 1e13 can still be summed over 1e12 targets in fp32."""

MIN_STD = 1e-4
"""Smallest standard deviation that advantages are divided by. Rewards are of order 1, so anything smaller is rounding."""

LARGEST_DENOMINATOR = 10**9
"""Of a share, as a fraction: decimals of nine digits are read exactly, and its product with 1e9 targets fits into int64."""


def constant(tensor: Tensor) -> Tensor:
    """Detach, in fp32 or fp64."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def rho1_weights(
    loss: Float[Tensor, "*shape"], reference_loss: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """``exp((loss - reference_loss) / temperature)``: the softmax of the excess loss, before normalisation.

    Divided by its mean over the targets of the global batch, it is that softmax times their number. The excess is signed: a token
    that is harder for the reference model than for the trained one weighs less than 1. Equal losses give exactly 1.

    Args:
        loss: Next-token loss of each target in nats; `reference_loss` is that under the reference model.
        temperature: Nats of excess loss that multiply a weight by e.

    Returns:
        Positive weights. Exponents are clamped to ±30 (`MAX_EXPONENT`).

    Raises:
        ValueError: `temperature` is not positive.

    Source:
        Rho-1 (arXiv:2404.07965), the excess loss ``L_Δ``. They select tokens by it (`keep_highest`); the weights are ours.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive: it divides the excess loss.")
    exponent = (constant(loss) - constant(reference_loss)) / temperature
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def keep_highest(
    scores: Float[Tensor, "*shape"], valid: Bool[Tensor, "*shape"], share: float
) -> Bool[Tensor, "*shape"]:
    """Select the ``ceil(share * number of valid targets)`` valid targets with the highest scores; of equal ones the first.

    Args:
        share: In ``(0, 1]``. It is read as the decimal that was written: 0.28 of 25 targets is 7, although the floating-point
            product is greater than 7.

    Raises:
        ValueError: `share` is outside ``(0, 1]``.

    Source:
        Rho-1 (arXiv:2404.07965), selective language modelling: the top share of a batch by excess loss.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]: it is the share of targets to keep.")
    kept, among = Fraction(share).limit_denominator(LARGEST_DENOMINATOR).as_integer_ratio()
    n_kept = (valid.sum() * kept + among - 1) // among
    order = scores.detach().flatten().argsort(descending=True, stable=True)
    candidates = valid.flatten()[order]
    selected = candidates & (candidates.cumsum(0) <= n_kept)
    return torch.empty_like(selected).scatter(0, order, selected).view(valid.shape)


def dft_weights(loss: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``exp(-loss)``, the model's probability of the target: unlikely targets count less.

    Source:
        Dynamic fine-tuning (arXiv:2508.05629).
    """
    return (-constant(loss)).exp()


def entropy_weights(entropy: Float[Tensor, "*shape"], vocab_size: int) -> Float[Tensor, "*shape"]:
    """``entropy / ln(vocab_size)``, in ``[0, 1]``: targets that the model is certain about count less. `entropy` is in nats.

    Raises:
        ValueError: the vocabulary has fewer than two tokens.

    Source:
        Entropy-adaptive fine-tuning (arXiv:2601.02151). They use the entropy of the 20 most probable tokens over ``ln 20``;
        we use that of the whole distribution, which includes a broad tail. With weights of mean 1 the divisor cancels.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2: a single token has no entropy.")
    return (constant(entropy) / math.log(vocab_size)).clamp(0, 1)


def gradient_norm(
    loss: Float[Tensor, "*shape"], sum_of_squares: Float[Tensor, "*shape"], hidden_norm: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Norm of each target's gradient of the unembedding, ``‖p - onehot(y)‖ · ‖h‖``, without a backward pass.

    A linear map's gradient is the outer product of output gradient and input, so its Frobenius norm is the product of their
    norms.

    Args:
        loss: Loss of each target in nats, ``-ln p_y``.
        sum_of_squares: ``Σ_v p(v)²`` of its prediction.
        hidden_norm: Euclidean norm of the hidden state that it was predicted from.

    Returns:
        A proxy for how far the target would move the model; gradients of other weights are not considered.
    """
    # ‖p - onehot(y)‖² = Σ p² - 2 p_y + 1 cancels where the model is certain. (1 - p_y)² + (Σ p² - p_y²) does not; rounding aside,
    # its second term lies between 0 and the first.
    missing = -torch.expm1(-constant(loss))
    others = constant(sum_of_squares) - (1 - missing).square()
    others = torch.minimum(others.clamp(min=0), missing.square())
    return (missing.square() + others).sqrt() * constant(hidden_norm)


def advantages(
    values: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"] | None,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T"]:
    """Generalised advantage of each target token, where writing the token is the action; 0 where `valid` is False.

    With the state ``s_j`` before token ``j``, ``V(s_j) = values[j - 1]`` and the sum running to the document's last target:

        δ_j = r_j + γ V(s_{j+1}) - V(s_j)          A_j = Σ_l (γλ)^l δ_{j+l}

    Only the last target has a reward, the document's outcome, and ``V`` after it is 0. Documents of a row are independent.
    Unlabelled tokens within a document, such as a second prompt, are steps like others, but get no advantage.

    Args:
        values: ``values[b, i]`` estimates the outcome from the document's tokens up to and including ``i``.
        rewards: Outcome of each token's document; read at its last target.
        valid: `valid_tokens`.
        gamma: Discount per token, in ``[0, 1]``.
        lam: Bias against variance, in ``[0, 1]``: 0 is the one-step TD error, 1 the discounted outcome minus ``V(s_j)``.

    Raises:
        ValueError: `gamma` or `lam` is outside ``[0, 1]``.

    Source:
        Schulman et al. (arXiv:1506.02438), equation 16.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must lie in [0, 1].")
    values, rewards = constant(values), constant(rewards)
    documents = number_documents(valid, position_ids)
    final = final_tokens(valid, position_ids)
    # Steps are a document's tokens up to its last target. Values elsewhere, above all at padding, may be anything, even NaN.
    steps = upcoming_document(valid, documents) == documents
    steps[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    steps[:, :1] = False
    delta = torch.where(final, rewards, gamma * values) - _states_before(values)
    delta = torch.where(steps, delta, 0)
    decay = (~final).to(delta.dtype) * (gamma * lam)

    advantage = torch.zeros_like(delta[:, 0])
    columns = []
    for delta_j, decay_j in zip(reversed(delta.unbind(1)), reversed(decay.unbind(1)), strict=True):
        advantage = torch.addcmul(delta_j, decay_j, advantage)
        columns.append(advantage)
    return torch.where(valid, torch.stack(columns[::-1], 1), 0)


def lambda_returns(
    advantages: Float[Tensor, "B T"], values: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """``A_j + V(s_j)``: the value that the state before each target should have, 0 where `valid` is False."""
    return torch.where(valid, constant(advantages) + _states_before(constant(values)), 0)


def _states_before(values: Tensor) -> Tensor:
    return F.pad(values[:, :-1], (1, 0))


def advantage_weights(
    advantages: Float[Tensor, "*shape"], mean: float, std: float, beta: float, low: float, high: float
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """``exp(z / beta)`` of the whitened advantage ``z = (A - mean) / std``, clipped to ``[low, high]``, and True where clipped.

    Args:
        std: Values below 1e-4 (`MIN_STD`) are raised to it.
        beta: Standard deviations that multiply a weight by e.

    Raises:
        ValueError: `beta` is not positive, or not ``0 <= low < high``.

    Source:
        Advantage-weighted regression (arXiv:1910.00177). They only clip from above, and do not whiten.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive: it divides the advantage.")
    if not 0 <= low < high:
        raise ValueError(f"low={low} and high={high} must satisfy 0 <= low < high.")
    raw = ((constant(advantages) - mean) / max(std, MIN_STD) / beta).exp()
    return raw.clamp(low, high), (raw < low) | (raw > high)


def group_advantages(
    rewards: Float[Tensor, "G S"], eps: float = 1e-4, normalise_std: bool = True
) -> Float[Tensor, "G S"]:
    """Reward of each sample relative to its group, ``(r - mean) / (std + eps)``.

    Args:
        rewards: One row per prompt, with the rewards of its samples.
        eps: Added to the standard deviation, so that a group of equal rewards gets zeros.
        normalise_std: Divide by the standard deviation (with ``S - 1`` in the denominator, as in TRL and verl).

    Raises:
        ValueError: a group has fewer than two samples, or `eps` is not positive.

    Source:
        GRPO (arXiv:2402.03300). Without `normalise_std`, Dr. GRPO (arXiv:2503.20783): the division favours prompts whose
        answers are nearly all right or nearly all wrong.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"A group of {rewards.shape[1]} cannot be compared with itself: draw at least 2 samples per prompt."
        )
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive: the rewards of a group may all be equal.")
    rewards = constant(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps) if normalise_std else centred
