"""Token weights: how much each target counts in a loss, from scores to weights, controls and statistics.

Shapes: B batch, T tokens, H heads (head ``h`` at position ``i`` predicts token ``i + 1 + h``; head 0 is the next-token head),
G groups, S samples per group.

A *score* ``s [B, T]`` describes the target: ``s[b, j]`` is about token ``j``, predicted from the tokens before it. A *weight*
``w [B, T, H]`` is indexed like the prediction, ``w[b, i, h] = s[b, i + 1 + h]``, and 0 where that is no target. So every head
weighs a token by the same score, which the next-token model defines.

Every function returns constants: no gradient flows through a weight. Results are fp32, or fp64 where an operand is.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from mull.runtime.distributed import gather, global_sum

IGNORED = -100

MAX_EXPONENT = 30.0
"""Bound of an exponent before ``exp``: e^30 = 1e13, whose square still sums over 1e12 targets in fp32."""

MIN_STD = 1e-4
"""Smallest standard deviation that advantages are divided by. Rewards are of order 1, so less is rounding, not signal."""

LARGEST_DENOMINATOR = 10**9
"""Of a share to keep, as a fraction: any decimal of nine digits is read exactly, and 1e9 targets times it fit int64."""


def targets_of(
    labels: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None, n_heads: int
) -> Int[Tensor, "B T {n_heads}"]:
    """The token that each head predicts at each position.

    Head ``h`` at ``i`` stays within its document if and only if ``position_ids[i + 1 + h] = position_ids[i] + 1 + h``: positions
    rise by at most 1 per token and a new document lowers them, so ``h + 1`` steps add up to ``h + 1`` only if all lie within one
    document.

    Args:
        labels: Token ids, not shifted; -100 where a token is no target, as on prompts and padding.
        position_ids: Position of each token in its document. None: a row is one document. Pass them for rows that are padded on
            the left, where a head would otherwise predict the second token from padding. Padding may have any position that
            does not lead up to a token's, such as 0, or less than ``-T``.
        n_heads: Number of heads.

    Returns:
        int64 ``labels[i + 1 + h]``, and -100 beyond the row or in another document.
    """
    targets = _shifted(labels, n_heads, IGNORED)
    if position_ids is None:
        return targets.contiguous()
    distance = torch.arange(1, n_heads + 1, device=labels.device)
    same_document = _shifted(position_ids, n_heads, 0) == position_ids[..., None] + distance
    return torch.where(same_document, targets, IGNORED)


def align(scores: Shaped[Tensor, "B T"], n_heads: int) -> Shaped[Tensor, "B T {n_heads}"]:
    """Bring what describes targets, scores or a mask, to the positions that predict them.

    Args:
        scores: ``scores[b, j]`` is about token ``j``.
        n_heads: Number of heads.

    Returns:
        ``scores[b, i + 1 + h]`` in the same dtype, 0 beyond the row. Documents are not looked at: mask with `targets_of`.
    """
    return _shifted(scores.detach(), n_heads, 0).contiguous()


def valid_tokens(labels: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
    """True where a token is a target of the next-token head: it has a label, and the token before it is of its document.

    Every other head's targets are among these.
    """
    targets = targets_of(labels, position_ids, 1)[:, :-1, 0]
    return F.pad(targets != IGNORED, (1, 0))


def final_tokens(valid: Bool[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
    """True at the last target of each document; padding or an unlabelled end may follow it.

    Args:
        valid: `valid_tokens`.
        position_ids: Position of each token in its document; None: a row is one document.
    """
    documents = _documents(valid, position_ids)
    following = F.pad(_upcoming(valid, documents)[:, 1:], (0, 1), value=valid.shape[1])
    return valid & (following != documents)


def _shifted(tensor: Tensor, n_heads: int, beyond: int) -> Tensor:
    """``tensor[i + 1 + h]``, ``[B, T, H]``, as a view of a new tensor."""
    return F.pad(tensor[:, 1:], (0, n_heads), value=beyond).unfold(1, n_heads, 1)


def _documents(valid: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number of each token's document in its row, from 0."""
    if position_ids is None:
        return torch.zeros_like(valid, dtype=torch.int64)
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(begins.cumsum(1), (1, 0))


def _upcoming(valid: Tensor, documents: Tensor) -> Tensor:
    """Document of the first target at or after each token, T where none follows. Documents are numbered upwards."""
    marked = torch.where(valid, documents, valid.shape[1])
    return marked.flip(1).cummin(1).values.flip(1)


def _constant(tensor: Tensor) -> Tensor:
    """Without gradient, in fp32 or fp64."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def rho1_weights(
    loss: Float[Tensor, "*shape"], reference_loss: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """``exp((loss - reference_loss) / temperature)``: the softmax of the excess loss before it is normalised.

    Dividing by the mean over all targets of the global batch makes it that softmax, times the number of targets. The excess is
    signed: a token that the reference model finds harder than the trained one weighs less than 1, not more. Equal losses give
    exactly 1.

    Args:
        loss: Next-token loss of each target in nats.
        reference_loss: Loss of the same targets under the reference model, in nats.
        temperature: Nats of excess loss that multiply a weight by e.

    Returns:
        Positive weights. The exponent is held within ±30 (`MAX_EXPONENT`), beyond which the softmax is no longer exact.

    Raises:
        ValueError: `temperature` is not positive.

    Source:
        Rho-1 (arXiv:2404.07965), the excess loss ``L_Δ``. They select tokens by it (`keep_highest`); the weights are ours.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive: it divides the excess loss.")
    exponent = (_constant(loss) - _constant(reference_loss)) / temperature
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def keep_highest(
    scores: Float[Tensor, "*shape"], valid: Bool[Tensor, "*shape"], share: float
) -> Bool[Tensor, "*shape"]:
    """Select the valid targets of the highest scores, exactly ``ceil(share * number of valid targets)`` of them.

    They are ranked against each other over the whole tensor, in its order among equal scores: the earlier one is kept.

    Args:
        scores: One score per target.
        valid: True at the targets to choose among.
        share: Share to keep, in ``(0, 1]``: 0.7 drops the lowest 30 %. It is read as the fraction it was written as, so that 0.28
            of 25 targets is 7, though the floating-point product exceeds 7.

    Returns:
        True at the selected targets.

    Raises:
        ValueError: `share` lies outside ``(0, 1]``.

    Source:
        Rho-1 (arXiv:2404.07965), selective language modelling: the top share of a batch by excess loss.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is the share of targets to keep and must lie in (0, 1].")
    kept, among = Fraction(share).limit_denominator(LARGEST_DENOMINATOR).as_integer_ratio()
    n_kept = (valid.sum() * kept + among - 1) // among
    order = scores.detach().flatten().argsort(descending=True, stable=True)
    candidates = valid.flatten()[order]
    selected = candidates & (candidates.cumsum(0) <= n_kept)
    return torch.empty_like(selected).scatter(0, order, selected).view(valid.shape)


def dft_weights(loss: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``exp(-loss)``, the probability that the model gives the target: what it finds unlikely counts less.

    Source:
        Dynamic fine-tuning (arXiv:2508.05629).
    """
    return (-_constant(loss)).exp()


def entropy_weights(entropy: Float[Tensor, "*shape"], vocab_size: int) -> Float[Tensor, "*shape"]:
    """``entropy / ln(vocab_size)``, in ``[0, 1]``: what the model is certain of counts less.

    Args:
        entropy: Entropy of the prediction in nats.
        vocab_size: Number of tokens that the prediction is over, at least 2.

    Raises:
        ValueError: the vocabulary has fewer than two tokens.

    Source:
        Entropy-adaptive fine-tuning (arXiv:2601.02151). They take the entropy of the 20 most probable tokens over ``ln 20``; this
        is that of the whole distribution, which needs no choice of 20 and cannot miss a broad tail. Under a mean weight of 1
        the divisor cancels.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2: a single token has no entropy.")
    return (_constant(entropy) / math.log(vocab_size)).clamp(0, 1)


def gradient_norm(
    loss: Float[Tensor, "*shape"], sum_of_squares: Float[Tensor, "*shape"], hidden_norm: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Norm of each target's gradient of the unembedding, ``‖p - onehot(y)‖ · ‖h‖``, without a backward pass.

    The gradient of a linear map is the outer product of output gradient and input, so its Frobenius norm is the product of
    theirs, and ``‖p - onehot(y)‖² = Σ p² - 2 p_y + 1``. That difference cancels where the model is certain. It is therefore
    computed as ``(1 - p_y)² + (Σ p² - p_y²)``, the first part from the loss, the second held between 0 and the first, where it
    must lie.

    Args:
        loss: Loss of each target in nats, ``-ln p_y``.
        sum_of_squares: ``Σ_v p(v)²`` of its prediction.
        hidden_norm: Euclidean norm of the hidden state it was predicted from, which stands one position before the target.

    Returns:
        A proxy for how far the target would move the model: other weights are not looked at.
    """
    missing = -torch.expm1(-_constant(loss))
    others = _constant(sum_of_squares) - (1 - missing).square()
    others = torch.minimum(others.clamp(min=0), missing.square())
    return (missing.square() + others).sqrt() * _constant(hidden_norm)


def advantages(
    values: Float[Tensor, "B T"],
    rewards: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"] | None,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T"]:
    """Generalised advantage of each target token, where writing the token is the action.

    With the state ``s_j`` before token ``j``, ``V(s_j) = values[j - 1]`` and the sum running to the document's last target:

        δ_j = r_j + γ V(s_{j+1}) - V(s_j)          A_j = Σ_l (γλ)^l δ_{j+l}

    ``V`` after the last target is 0, and only there is a reward: the document's outcome. Documents of a row do not see each
    other. Tokens without a label in the middle of a document, such as a second prompt, are steps like others whose advantage is
    not returned.

    Args:
        values: ``values[b, i]`` estimates the outcome from the document's tokens up to ``i``, itself included.
        rewards: Outcome of the document that a token belongs to; read at its last target.
        valid: `valid_tokens`.
        position_ids: Position of each token in its document; None: a row is one document.
        gamma: Discount per token, in ``[0, 1]``.
        lam: Trade of bias against variance, in ``[0, 1]``: 0 is the one-step TD error, 1 the discounted outcome minus
            ``V(s_j)``.

    Returns:
        Advantages, 0 where `valid` is False.

    Raises:
        ValueError: `gamma` or `lam` lies outside ``[0, 1]``.

    Source:
        Schulman et al. (arXiv:1506.02438), equation 16.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must lie in [0, 1].")
    values, rewards = _constant(values), _constant(rewards)
    documents = _documents(valid, position_ids)
    final = final_tokens(valid, position_ids)
    # Steps of a document up to its last target. What else a row holds, padding above all, may hold any value, NaN included.
    steps = _upcoming(valid, documents) == documents
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
    """``A_j + V(s_j)``: what the value of the state before each target should be, 0 where `valid` is False.

    Args:
        advantages: `advantages` of the same values.
        values: ``values[b, i]`` of the document's tokens up to ``i``, itself included.
        valid: `valid_tokens`.
    """
    return torch.where(valid, _constant(advantages) + _states_before(_constant(values)), 0)


def _states_before(values: Tensor) -> Tensor:
    return F.pad(values[:, :-1], (1, 0))


def advantage_weights(
    advantages: Float[Tensor, "*shape"], mean: float, std: float, beta: float, low: float, high: float
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """``exp(z / beta)`` of the whitened advantage ``z = (A - mean) / std``, clipped to ``[low, high]``.

    Args:
        advantages: Advantage of each target.
        mean: Mean advantage, of `RunningMoments`.
        std: Standard deviation of advantages, of `RunningMoments`; at least 1e-4 (`MIN_STD`) is divided by.
        beta: Standard deviations that multiply a weight by e.
        low: Smallest weight, at least 0.
        high: Largest weight.

    Returns:
        The weights, and True where one was clipped.

    Raises:
        ValueError: `beta` is not positive, or not ``0 <= low < high``.

    Source:
        Advantage-weighted regression (arXiv:1910.00177). They clip above only; whitening and the lower clip are additions.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive: it divides the advantage.")
    if not 0 <= low < high:
        raise ValueError(f"low={low} and high={high} must satisfy 0 <= low < high.")
    raw = ((_constant(advantages) - mean) / max(std, MIN_STD) / beta).exp()
    return raw.clamp(low, high), (raw < low) | (raw > high)


def group_advantages(
    rewards: Float[Tensor, "G S"], eps: float = 1e-4, normalise_std: bool = True
) -> Float[Tensor, "G S"]:
    """Reward of each sample relative to its group, ``(r - mean) / (std + eps)``.

    Args:
        rewards: Rewards of the samples that answer one prompt, a row per prompt.
        eps: Added to the standard deviation; a group of equal rewards gets zeros.
        normalise_std: Divide by the standard deviation (with ``S - 1`` in the denominator, as TRL and verl compute it).

    Raises:
        ValueError: a group has fewer than two samples, or `eps` is not positive.

    Source:
        GRPO (arXiv:2402.03300); without `normalise_std` Dr. GRPO (arXiv:2503.20783), which removes the division because it
        favours prompts whose answers are nearly all right or nearly all wrong.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"A group of {rewards.shape[1]} has no other sample to compare with: take at least 2 samples per prompt."
        )
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive: the rewards of a group may all be equal.")
    rewards = _constant(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps) if normalise_std else centred


class RunningMoments:
    """Mean and standard deviation over the recent steps, each target of which counts ``1 - momentum`` times one of the next.

    What decays are the sums and the count, so that a step of few targets counts little, one of none changes nothing, and the
    first step needs no correction for starting at zero.

    Args:
        momentum: Share of the newest step once many have been seen, in ``(0, 1]``; 0.1 looks back about ten steps.

    Raises:
        ValueError: `momentum` lies outside ``(0, 1]``.
    """

    def __init__(self, momentum: float) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in (0, 1].")
        self.momentum = momentum
        self._sum = self._sum_of_squares = self._count = 0.0

    @property
    def ready(self) -> bool:
        """Whether a target has been seen; only then is there a mean."""
        return self._count > 0

    @property
    def mean(self) -> float:
        """Running mean."""
        return self._sum / self._count

    @property
    def std(self) -> float:
        """Running standard deviation, of the population; it includes how far the mean itself moved."""
        return math.sqrt(max(self._sum_of_squares / self._count - self.mean**2, 0.0))

    def update(self, total: float, sum_of_squares: float, count: float) -> None:
        """Take in a step: sums over the targets of all micro-batches and ranks, added up in fp64."""
        keep = 1 - self.momentum
        self._sum = keep * self._sum + self.momentum * total
        self._sum_of_squares = keep * self._sum_of_squares + self.momentum * sum_of_squares
        self._count = keep * self._count + self.momentum * count

    def state_dict(self) -> dict[str, float]:
        """The decayed sums and count."""
        return {"sum": self._sum, "sum_of_squares": self._sum_of_squares, "count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict`."""
        self._sum, self._sum_of_squares, self._count = state["sum"], state["sum_of_squares"], state["count"]


def shuffle(
    weights: Float[Tensor, "*N H"], valid: Bool[Tensor, "*N H"], generator: torch.Generator
) -> Float[Tensor, "*N H"]:
    """Control: the same weights at random targets.

    Each head's weights are permuted among all its valid targets in the tensor, so that every statistic of a head stays what it
    was and only the choice of tokens is lost. Heads are permuted independently.

    Args:
        weights: Weights to permute.
        valid: True at the targets.
        generator: Source of the permutation, on any device.

    Returns:
        The permuted weights, 0 where `valid` is False.
    """
    flat, targets = weights.detach().flatten(0, -2), valid.flatten(0, -2)
    keys = torch.rand(flat.shape, generator=generator, device=generator.device, dtype=torch.float64).to(flat.device)
    # Both orders list a head's targets before its other entries: one as they stand, one at random.
    places = targets.to(torch.uint8).argsort(dim=0, descending=True, stable=True)
    sources = torch.where(targets, keys, 2.0).argsort(dim=0, stable=True)
    shuffled = torch.zeros_like(flat).scatter(0, places, flat.gather(0, sources))
    return torch.where(targets, shuffled, 0).view(weights.shape)


def matched_random(
    weights: Float[Tensor, "*N H"], valid: Bool[Tensor, "*N H"], generator: torch.Generator
) -> Float[Tensor, "*N H"]:
    """Control: log-normal weights that know nothing of the tokens.

    Per head, the mean over its valid targets is exactly that of `weights`. The standard deviation is that of the distribution
    drawn from, so a sample's differs by its sampling error. Not matched: the share of zeros, clipping, the shape of the tails.

    Args:
        weights: Weights to imitate, not negative.
        valid: True at the targets.
        generator: Source of the draws, on any device.

    Returns:
        Random weights, 0 where `valid` is False.

    Raises:
        ValueError: a valid weight is negative, which no log-normal number is.
    """
    targets = valid.flatten(0, -2)
    flat = torch.where(targets, _constant(weights).flatten(0, -2), 0).double()
    if (flat < 0).any():
        raise ValueError("Signed weights have no log-normal counterpart: use the shuffled control with them.")
    count = targets.sum(0).clamp(min=1)
    total = flat.sum(0)
    mean = total / count
    variance = torch.where(targets, flat - mean, 0).square().sum(0) / count
    sigma = torch.log1p(variance / torch.where(mean > 0, mean, 1).square()).sqrt()
    normal = torch.randn(flat.shape, generator=generator, device=generator.device, dtype=torch.float64).to(flat.device)
    draws = torch.where(targets, (sigma * normal - sigma.square() / 2).exp(), 0)
    draws = draws * (total / draws.sum(0).clamp(min=torch.finfo(torch.float64).tiny))
    return draws.to(_constant(weights).dtype).view(weights.shape)


@dataclass(frozen=True, slots=True, eq=False)
class WeightStatistics:
    """What a set of weights looks like, as sums that add over micro-batches and ranks.

    Signed weights enter by their absolute value.
    """

    sums: Tensor
    """``[6, H]`` fp64 over each head's valid targets: their number, ``Σ|w|``, ``Σ w²``, ``Σ |w| ln |w|``, clipped ones, zeros."""

    largest: Tensor
    """``[H]`` fp64: largest ``|w|``."""

    @classmethod
    def measure(
        cls,
        weights: Float[Tensor, "*N H"],
        valid: Bool[Tensor, "*N H"],
        clipped: Bool[Tensor, "*N H"] | None = None,
    ) -> "WeightStatistics":
        """Measure the weights of one micro-batch.

        Args:
            weights: Weights before they are normalised.
            valid: True at the targets.
            clipped: True where a weight was clipped.
        """
        targets = valid.flatten(0, -2)
        size = torch.where(targets, weights.detach().flatten(0, -2), 0).double().abs()
        marked = torch.zeros_like(targets) if clipped is None else clipped.flatten(0, -2) & targets
        terms = [targets, size, size.square(), torch.xlogy(size, size), marked, targets & (size == 0)]
        return cls(torch.stack([term.sum(0, dtype=torch.float64) for term in terms]), size.amax(0))

    def __add__(self, other: "WeightStatistics") -> "WeightStatistics":
        return WeightStatistics(self.sums + other.sums, torch.maximum(self.largest, other.largest))

    def over_ranks(self) -> "WeightStatistics":
        """Of all ranks' weights; collective."""
        return WeightStatistics(global_sum(self.sums), torch.stack(gather(self.largest)).amax(0))

    def report(self) -> dict[str, float]:
        """Numbers to log: ``weights/<name>`` over all heads, ``weights/head<h>/<name>`` of each head that has targets.

        * ``ess``: effective sample size as a share of the targets, ``(Σ|w|)² / (n Σ w²)``; 1 if all are equal.
        * ``entropy``: of ``|w| / Σ|w|``, over ``ln n``; 1 if all are equal.
        * ``mean``: ``Σ|w| / n``, what normalising to mean 1 divides by.
        * ``max``: largest weight after dividing by the mean over all heads.
        * ``clip_rate``, ``zero_rate``: shares of the targets.

        Of weights that are all 0, `ess`, `entropy` and `max` are 0.
        """
        overall = self.sums.sum(1)
        mean = float(overall[1] / overall[0].clamp(min=1))
        groups = {"weights": _describe(overall.tolist(), float(self.largest.max()), mean)}
        for head, (sums, largest) in enumerate(zip(self.sums.T.tolist(), self.largest.tolist(), strict=True)):
            groups[f"weights/head{head}"] = _describe(sums, largest, mean)
        return {f"{group}/{name}": number for group, numbers in groups.items() for name, number in numbers.items()}


def _describe(sums: list[float], largest: float, overall_mean: float) -> dict[str, float]:
    count, total, squares, total_ln, clipped, zeros = sums
    if count == 0:
        return {}
    entropy = 0.0
    if total > 0:
        entropy = (math.log(total) - total_ln / total) / math.log(count) if count > 1 else 1.0
    return {
        "ess": total**2 / (count * squares) if total > 0 else 0.0,
        "entropy": entropy,
        "mean": total / count,
        "max": largest / overall_mean if overall_mean > 0 else 0.0,
        "clip_rate": clipped / count,
        "zero_rate": zeros / count,
    }
