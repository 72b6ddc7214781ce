"""Claim: a weight belongs to the target it scores, in its own document, and is a constant; controls and statistics are exact."""

import json
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mull.ops.targets import IGNORED, align, final_tokens, require_targets, targets_of, valid_tokens
from mull.ops.token_weights import (
    MAX_EXPONENT,
    advantage_weights,
    advantages,
    dft_weights,
    entropy_weights,
    gradient_norm,
    group_advantages,
    keep_highest,
    lambda_returns,
    rho1_weights,
)
from mull.training.objectives import weight_statistics
from mull.training.objectives.weight_statistics import RunningMoments, WeightStatistics, matched_random, shuffle

NO_TARGET = -100
SEEDS = st.integers(0, 2**20)


def packed(seed: int, rows: int = 3, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Random documents in rows: labels (unique ids, some ignored), position ids, and the number of each token's document."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, tokens, generator=generator) < 0.3
    begins[:, 0] = True
    documents = begins.cumsum(1)
    index = torch.arange(tokens).expand(rows, -1)
    positions = index - torch.where(begins, index, 0).cummax(1).values
    labels = torch.arange(rows * tokens).view(rows, tokens) + 1
    ignored = torch.rand(rows, tokens, generator=generator) < 0.3
    return torch.where(ignored, NO_TARGET, labels), positions, documents


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 9), n_heads=st.integers(1, 5), is_packed=st.booleans())
def test_targets_are_those_of_a_loop_over_documents(seed: int, tokens: int, n_heads: int, is_packed: bool) -> None:
    labels, positions, documents = packed(seed, tokens=tokens)
    targets = targets_of(labels, positions if is_packed else None, n_heads)
    assert targets.shape == (3, tokens, n_heads)
    assert targets.dtype == torch.int64
    for b in range(3):
        for i in range(tokens):
            for h in range(n_heads):
                j = i + 1 + h
                inside = j < tokens and (not is_packed or documents[b, i] == documents[b, j])
                assert targets[b, i, h] == (labels[b, j] if inside else NO_TARGET)


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 9), n_heads=st.integers(1, 5))
def test_every_head_weighs_a_token_by_its_one_score(seed: int, tokens: int, n_heads: int) -> None:
    labels, positions, _ = packed(seed, tokens=tokens)
    targets = targets_of(labels, positions, n_heads)
    valid = targets != NO_TARGET
    # A token's score is its id, and ids are unique: the weight must be the id of the target.
    assert torch.equal(align(labels.float(), n_heads)[valid], targets[valid].float())
    beyond = torch.arange(tokens)[:, None] + 1 + torch.arange(n_heads) >= tokens
    assert (align(labels.float() + 1, n_heads)[:, beyond] == 0).all()


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 9))
def test_the_targets_of_every_head_are_among_the_valid_tokens(seed: int, tokens: int) -> None:
    labels, positions, _ = packed(seed, tokens=tokens)
    valid = valid_tokens(labels, positions)
    targets = targets_of(labels, positions, 4)
    assert align(valid, 4).dtype == torch.bool
    assert align(valid, 4)[targets != NO_TARGET].all()
    assert torch.equal(align(valid, 1), targets[..., :1] != NO_TARGET)
    assert not valid[positions == 0].any(), "nothing of its document precedes the first token"


def test_left_padding_predicts_nothing_given_its_position_ids() -> None:
    labels = torch.tensor([[NO_TARGET, NO_TARGET, NO_TARGET, 5, 6, 7]])
    for padding in (
        0,
        1,
        -12,
    ):  # transformers fills the positions of padding with 1, others with 0; mull marks it by -2T
        positions = torch.tensor([[padding] * 3 + [0, 1, 2]])
        targets = targets_of(labels, positions, 3)
        assert (targets[:, :3] == NO_TARGET).all()
        assert targets[0, 3].tolist() == [6, 7, NO_TARGET]


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 9))
def test_the_final_token_is_the_last_target_of_its_document(seed: int, tokens: int) -> None:
    labels, positions, documents = packed(seed, tokens=tokens)
    valid = valid_tokens(labels, positions)
    last = {(b, int(documents[b, j])): j for b, j in valid.nonzero().tolist()}
    expected = {(b, j) for (b, _), j in last.items()}
    assert {(b, j) for b, j in final_tokens(valid, positions).nonzero().tolist()} == expected
    whole_row = final_tokens(valid, None)
    assert torch.equal(whole_row.any(1), valid.any(1))
    assert [j for _, j in whole_row.nonzero().tolist()] == [int(row.nonzero().max()) for row in valid if row.any()]


def test_equal_models_weigh_every_token_exactly_one() -> None:
    loss = torch.rand(4, 7) * 10
    assert torch.equal(rho1_weights(loss, loss.clone(), 0.3), torch.ones(4, 7))


def test_rho1_is_the_softmax_of_the_signed_excess_loss() -> None:
    loss, reference = torch.rand(4, 7) * 8, torch.rand(4, 7) * 8
    weights = rho1_weights(loss, reference, 0.7)
    expected = ((loss - reference) / 0.7).flatten().softmax(0) * weights.numel()
    torch.testing.assert_close((weights / weights.mean()).flatten(), expected)
    # A token harder for the reference, however far apart the two are, must not outrank one worth learning.
    forgotten, learnable = rho1_weights(torch.tensor([0.2, 4.0]), torch.tensor([5.0, 1.0]), 1.0)
    assert forgotten < 1 < learnable


def test_extreme_excess_losses_neither_overflow_nor_vanish() -> None:
    weights = rho1_weights(torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4]), 0.01)
    assert weights.tolist() == pytest.approx([math.exp(MAX_EXPONENT), math.exp(-MAX_EXPONENT)], rel=1e-4)
    assert (weights.square() * 1e12).isfinite().all()


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(-3, 3), max_size=60),
    share=st.one_of(st.integers(1, 100).map(lambda n: n / 100), st.floats(0.01, 1)),
    seed=SEEDS,
)
def test_exactly_the_share_is_kept_and_the_earlier_of_equal_scores(scores: list[int], share: float, seed: int) -> None:
    valid = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < 0.7
    mask = keep_highest(torch.tensor(scores, dtype=torch.float32), valid, share)
    n_kept = math.ceil(Fraction(share).limit_denominator(10**9) * int(valid.sum()))
    ranked = sorted(valid.nonzero()[:, 0].tolist(), key=lambda j: (-scores[j], j))
    assert mask.nonzero()[:, 0].tolist() == sorted(ranked[:n_kept])


def test_dropping_the_lowest_share_counts_as_it_is_written() -> None:
    scores, valid = torch.rand(3, 100), torch.ones(3, 100, dtype=torch.bool)
    assert [int(keep_highest(scores, valid, share).sum()) for share in (0.7, 1 - 0.3, 0.1, 1.0)] == [210, 210, 30, 300]
    assert math.ceil(0.28 * 25) == 8
    assert int(keep_highest(scores[0, :25], valid[0, :25], 0.28).sum()) == 7
    assert int(keep_highest(scores[0], valid[0], 0.15).sum()) == 15, "in fp32 the product exceeds 15"


def test_invalid_targets_are_not_kept_even_before_the_worst_scores() -> None:
    scores = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.inf])
    valid = torch.tensor([False, True, False, True])
    assert keep_highest(scores, valid, 0.5).tolist() == [False, True, False, False]
    assert keep_highest(scores, valid, 1.0).tolist() == valid.tolist()


def prediction(confidence: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, targets and probabilities of 50 predictions over 11 tokens."""
    hidden, weight, targets = noise((50, 8), 1), noise((11, 8), 2) * confidence, torch.arange(50) % 11
    return hidden, weight, targets, (hidden @ weight.T).softmax(-1)


def test_probability_and_entropy_weights_are_those_of_the_prediction() -> None:
    _, _, targets, p = prediction()
    chosen = p[torch.arange(50), targets]
    torch.testing.assert_close(dft_weights(-chosen.log()), chosen)
    weights = entropy_weights(torch.tensor([0.0, math.log(11), -1e-7, 1.0]), 11)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.0, 1 / math.log(11)]))
    assert weights.min() == 0, "rounding must not make a weight negative"


def test_gradient_norm_is_that_of_each_targets_gradient_of_the_unembedding() -> None:
    hidden, weight, targets, p = prediction()
    weight.requires_grad_()
    losses = -(hidden @ weight.T).log_softmax(-1)[torch.arange(50), targets]
    expected = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in losses])
    torch.testing.assert_close(gradient_norm(losses, p.square().sum(-1), hidden.norm(dim=-1)), expected)


@pytest.mark.parametrize("rounding", [-1.2e-7, 0.0, 1.2e-7], ids=["down", "none", "up"])
def test_gradient_norm_in_fp32_is_right_for_certain_predictions(rounding: float) -> None:
    gap = torch.linspace(0, 30, 200, dtype=torch.float64)
    logits = torch.stack([gap, torch.zeros_like(gap), torch.zeros_like(gap) - 1], -1)
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    exact = (torch.expm1(log_p[:, 0]).square() + p[:, 1:].square().sum(-1)).sqrt()
    single = gradient_norm(-log_p[:, 0].float(), p.float().square().sum(-1) + rounding, torch.ones(200))
    assert single.dtype == torch.float32
    # The other probabilities' squares drown in those of the target: at worst they count as one probability or as none.
    ratio = single.double() / exact
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.42
    torch.testing.assert_close(single[gap < 5].double(), exact[gap < 5], rtol=2e-3, atol=0)


def literal_advantages(
    values: Tensor, rewards: Tensor, valid: Tensor, documents: Tensor, gamma: float, lam: float
) -> Tensor:
    """Each advantage as its own sum, in fp64, document by document."""
    expected = torch.zeros_like(values)
    for b in range(len(values)):
        for document in documents[b].unique():
            labelled = (valid[b] & (documents[b] == document)).nonzero()[:, 0].tolist()
            for j in labelled:
                last = labelled[-1]
                for step in range(j, last + 1):
                    after = rewards[b, step] if step == last else gamma * values[b, step]
                    expected[b, j] += (gamma * lam) ** (step - j) * (after - values[b, step - 1])
    return expected


@settings(deadline=None)
@given(
    seed=SEEDS, tokens=st.integers(1, 12), gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0])
)
def test_advantages_are_the_literal_sums_of_each_document(seed: int, tokens: int, gamma: float, lam: float) -> None:
    labels, positions, documents = packed(seed, tokens=tokens)
    valid = valid_tokens(labels, positions)
    values, rewards = noise(labels.shape, seed), noise(labels.shape, seed + 1)
    actual = advantages(values, rewards, valid, positions, gamma, lam)
    torch.testing.assert_close(actual, literal_advantages(values, rewards, valid, documents, gamma, lam))
    one = torch.ones_like(documents)
    valid = valid_tokens(labels, None)
    actual = advantages(values, rewards, valid, None, gamma, lam)
    torch.testing.assert_close(actual, literal_advantages(values, rewards, valid, one, gamma, lam))


def test_packed_documents_get_the_advantages_they_get_alone() -> None:
    lengths = [4, 7, 5]
    labels = torch.arange(16)[None]
    values, rewards = noise((1, 16), 3), noise((1, 16), 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = advantages(values, rewards, valid_tokens(labels, positions), positions, 0.99, 0.9)
    alone = []
    for part, value, reward in zip(
        labels.split(lengths, 1), values.split(lengths, 1), rewards.split(lengths, 1), strict=True
    ):
        alone.append(advantages(value, reward, valid_tokens(part, None), None, 0.99, 0.9))
    assert torch.equal(together, torch.cat(alone, 1))


def test_what_is_no_step_of_a_document_does_not_matter() -> None:
    # A prompt of two tokens, two targets, an unlabelled end; a document without targets; one of two targets; padding.
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 0, 1]])
    labelled = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]]).bool()
    labels = torch.where(labelled, 7, NO_TARGET)
    valid = valid_tokens(labels, positions)
    assert torch.equal(valid, labelled)
    values, rewards = noise((1, 12), 5), noise((1, 12), 6)
    expected = advantages(values, rewards, valid, positions, 0.9, 0.8)
    read = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]]).bool()  # values of the states before targets
    assert torch.equal(final_tokens(valid, positions).nonzero()[:, 1], torch.tensor([3, 9]))
    spoilt = advantages(
        values.masked_fill(~read, torch.nan),
        rewards.masked_fill(~final_tokens(valid, positions), torch.nan),
        valid,
        positions,
        0.9,
        0.8,
    )
    # The prompt's own values are steps, too; they may be NaN here because only earlier tokens' advantages would see them.
    assert torch.equal(spoilt, expected)
    assert (expected[~valid] == 0).all()


def test_lambda_one_is_the_outcome_minus_the_value_and_the_limit_of_smaller_ones() -> None:
    labels, positions, documents = packed(11, rows=4, tokens=30)
    valid = valid_tokens(labels, positions)
    outcome = (documents % 2).double()
    values = noise(labels.shape, 7)
    whole = advantages(values, outcome, valid, positions, 1.0, 1.0)
    before = values.roll(1, 1)
    torch.testing.assert_close(whole[valid], (outcome - before)[valid])
    torch.testing.assert_close(lambda_returns(whole, values, valid), torch.where(valid, outcome, 0))
    nearly = advantages(values, outcome, valid, positions, 1.0, 1.0 - 1e-7)
    torch.testing.assert_close(nearly, whole, atol=1e-4, rtol=0)


def test_returns_with_lambda_zero_look_one_token_ahead() -> None:
    values, outcome = noise((1, 5), 8), torch.full((1, 5), 0.5, dtype=torch.float64)
    valid = torch.tensor([[False, True, True, True, True]])
    returns = lambda_returns(advantages(values, outcome, valid, None, 0.9, 0.0), values, valid)
    torch.testing.assert_close(returns[0, 1:4], 0.9 * values[0, 1:4])
    assert float(returns[0, 4]) == 0.5


def test_advantage_weights_whiten_exponentiate_and_clip() -> None:
    a = noise((5, 40), 9) * 3 + 2
    mean, std = float(a.mean()), float(a.std(correction=0))
    weights, clipped = advantage_weights(a, mean, std, 0.8, 0.2, 3.0)
    raw = (((a - mean) / std) / 0.8).exp()
    torch.testing.assert_close(weights, raw.clip(0.2, 3.0))
    assert torch.equal(clipped, weights != raw)
    assert 0 < int(clipped.sum()) < a.numel()
    moved, _ = advantage_weights(10 * a - 4, 10 * mean - 4, 10 * std, 0.8, 0.2, 3.0)
    torch.testing.assert_close(moved, weights)


def test_equal_advantages_weigh_one_and_huge_ones_are_clipped() -> None:
    equal = torch.full((2, 3), 0.1)
    weights, clipped = advantage_weights(equal, float(torch.tensor(0.1, dtype=torch.float64)), 0.0, 0.05, 0.1, 3.0)
    torch.testing.assert_close(weights, torch.ones(2, 3), atol=1e-3, rtol=0)
    assert not clipped.any()
    weights, clipped = advantage_weights(torch.tensor([1e30, -1e30]), 0.0, 1.0, 0.01, 0.1, 3.0)
    assert weights.tolist() == pytest.approx([3.0, 0.1])
    assert clipped.all()


def feed(moments: RunningMoments, step: Tensor) -> None:
    moments.update(float(step.sum()), float(step.square().sum()), float(step.numel()))


def test_running_moments_are_those_of_the_exponentially_weighted_targets() -> None:
    steps = [noise((n,), n) + n for n in (5, 40, 1, 12)]
    moments = RunningMoments(0.3)
    assert not moments.ready
    for step in steps:
        feed(moments, step)
    weight = torch.cat([torch.full((len(step),), 0.7**age) for step, age in zip(steps, (3, 2, 1, 0), strict=True)])
    values = torch.cat(steps)
    mean = (weight * values).sum() / weight.sum()
    variance = (weight * (values - mean).square()).sum() / weight.sum()
    assert moments.ready
    assert moments.mean == pytest.approx(float(mean))
    assert moments.std == pytest.approx(float(variance.sqrt()))


def test_running_moments_start_exact_ignore_empty_steps_and_resume() -> None:
    step = noise((20,), 1)
    moments = RunningMoments(0.1)
    moments.update(0.0, 0.0, 0.0)
    assert not moments.ready
    feed(moments, step)
    assert (moments.mean, moments.std) == pytest.approx((float(step.mean()), float(step.std(correction=0))))
    before = moments.mean, moments.std
    moments.update(0.0, 0.0, 0.0)
    assert (moments.mean, moments.std) == pytest.approx(before)
    resumed = RunningMoments(0.1)
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for each in (moments, resumed):
        feed(each, step * 2)
    assert (resumed.mean, resumed.std) == (moments.mean, moments.std)


def test_the_std_of_equal_numbers_is_zero_not_nan() -> None:
    moments = RunningMoments(0.1)
    feed(moments, torch.full((3,), 0.1, dtype=torch.float64))
    assert moments.std == pytest.approx(0, abs=1e-8)


def test_group_advantages_compare_a_sample_with_its_own_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1], [5.0, 7.0, 9.0, 3.0]])
    grpo = group_advantages(rewards, 1e-4)
    std = torch.tensor([0.5, 0, 0, math.sqrt(20 / 3)])[:, None]
    torch.testing.assert_close(grpo, (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4))
    torch.testing.assert_close(grpo[1:3], torch.zeros(2, 4))
    torch.testing.assert_close(group_advantages(rewards, normalise_std=False), rewards - rewards.mean(1, keepdim=True))


def weighted(seed: int, n_heads: int = 4) -> tuple[Tensor, Tensor]:
    labels, positions, _ = packed(seed, rows=6, tokens=20)
    valid = targets_of(labels, positions, n_heads) != NO_TARGET
    return torch.where(valid, align(noise(labels.shape, seed).float().exp(), n_heads), 0), valid


@settings(deadline=None)
@given(seed=SEEDS)
def test_shuffling_keeps_each_heads_multiset_of_weights_on_its_targets(seed: int) -> None:
    weights, valid = weighted(seed)
    shuffled = shuffle(weights, valid, torch.Generator().manual_seed(seed))
    assert (shuffled[~valid] == 0).all()
    for head in range(4):
        ours, theirs = (x[..., head][valid[..., head]].sort().values for x in (shuffled, weights))
        assert torch.equal(ours, theirs)
    assert torch.equal(shuffled, shuffle(weights, valid, torch.Generator().manual_seed(seed)))
    # What stands at other places must not be drawn.
    spoilt = shuffle(weights.masked_fill(~valid, torch.nan), valid, torch.Generator().manual_seed(seed))
    assert torch.equal(spoilt, shuffled)


def test_shuffling_draws_every_permutation_equally_often_and_heads_independently() -> None:
    n_draws = 6000  # as heads
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0])[:, None].expand(4, n_draws)
    shuffled = shuffle(weights, weights > 0, torch.Generator().manual_seed(0))
    counts = Counter(map(tuple, shuffled.T.tolist()))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 5 / 6) for count in counts.values())


@settings(deadline=None)
@given(seed=SEEDS)
def test_matched_random_weights_keep_each_heads_mean(seed: int) -> None:
    weights, valid = weighted(seed)
    drawn = matched_random(weights, valid, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(drawn.sum((0, 1)), weights.sum((0, 1)))
    assert (drawn[~valid] == 0).all()
    assert (drawn[valid] > 0).all()


def test_matched_random_weights_are_log_normal_with_the_std_of_the_weights() -> None:
    weights = torch.rand(1, 200_000, 2) * torch.tensor([1.0, 4.0]) + torch.tensor([0.5, 0.0])
    valid = torch.rand(1, 200_000, 2) < 0.5
    drawn = matched_random(weights, valid, torch.Generator().manual_seed(0))
    for head in range(2):
        ours, theirs = (x[..., head][valid[..., head]] for x in (drawn, weights))
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)
        z = (ours.log() - ours.log().mean()) / ours.log().std()
        assert float(z.pow(3).mean()) == pytest.approx(0, abs=0.05)
        assert float(z.pow(4).mean()) == pytest.approx(3, abs=0.1)


def test_matched_random_weights_of_heads_without_targets_or_weight_are_zero() -> None:
    weights, valid = torch.ones(1, 3, 2), torch.tensor([[[True, False]] * 3])
    assert matched_random(weights, valid, torch.Generator()).tolist() == [[[1.0, 0.0]] * 3]
    assert matched_random(0 * weights, valid, torch.Generator()).tolist() == [[[0.0, 0.0]] * 3]


@settings(deadline=None)
@given(seed=SEEDS, signed=st.booleans())
def test_statistics_of_parts_add_up_to_the_direct_formulas_of_the_whole(seed: int, signed: bool) -> None:
    weights, valid = weighted(seed)
    weights = weights * noise(weights.shape, seed).sign().float() if signed else weights
    weights = torch.where(weights.abs() < 0.4, 0, weights)
    clipped = (weights.abs() > 2) | ~valid
    parts = [WeightStatistics.measure(w, v, c) for w, v, c in zip(weights, valid, clipped, strict=True)]
    report = sum(parts[1:], parts[0]).over_ranks().report()
    overall = weights[valid].double().abs()
    expected = {}
    for name, head in {"weights": slice(None), **{f"weights/head{h}": h for h in range(4)}}.items():
        w = weights[..., head][valid[..., head]].double().abs()
        assume(len(w) > 1 and w.sum() > 0)
        share = w[w > 0] / w.sum()
        expected |= {
            f"{name}/ess": float(w.sum() ** 2 / w.square().sum() / len(w)),
            f"{name}/entropy": float(-(share * share.log()).sum() / math.log(len(w))),
            f"{name}/mean": float(w.mean()),
            f"{name}/max": float(w.max() / overall.mean()),
            f"{name}/clip_rate": float((w > 2).double().mean()),
            f"{name}/zero_rate": float((w == 0).double().mean()),
        }
    assert report == pytest.approx(expected)


def test_statistics_of_equal_single_zero_and_missing_weights_are_finite() -> None:
    valid = torch.tensor([[[True, True, True, False], [True, False, True, False]]])
    weights = torch.tensor([[[2.0, 3.0, 0.0, torch.nan], [2.0, torch.nan, 0.0, torch.nan]]])
    report = WeightStatistics.measure(weights, valid).report()
    assert (report["weights/head0/ess"], report["weights/head0/entropy"]) == pytest.approx((1, 1))
    assert (report["weights/head1/ess"], report["weights/head1/entropy"]) == (1, 1)
    assert (report["weights/head2/ess"], report["weights/head2/entropy"], report["weights/head2/zero_rate"]) == (
        0,
        0,
        1,
    )
    assert not any(name.startswith("weights/head3") for name in report)
    assert all(map(math.isfinite, report.values()))
    nothing = WeightStatistics.measure(weights, torch.zeros_like(valid)).report()
    assert nothing == {}
    zero = WeightStatistics.measure(0 * weights, valid & (weights == weights)).report()
    assert (zero["weights/ess"], zero["weights/max"]) == (0, 0)


def test_statistics_of_ranks_add_and_the_largest_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (WeightStatistics.measure(*weighted(seed)) for seed in (1, 2))
    for one, other in ((ours, theirs), (theirs, ours)):
        monkeypatch.setattr(weight_statistics, "global_sum", lambda sums, other=other: sums + other.sums)
        monkeypatch.setattr(weight_statistics, "gather", lambda largest, other=other: [largest, other.largest])
        assert one.over_ranks().report() == (ours + theirs).report()


def test_no_gradient_flows_through_any_weight() -> None:
    x = torch.rand(2, 6, requires_grad=True)
    w = torch.rand(2, 6, 3, requires_grad=True)
    valid, generator = torch.ones(2, 6, dtype=torch.bool), torch.Generator()
    every = torch.ones(2, 6, 3, dtype=torch.bool)
    credit = advantages(x, x, valid, None, 0.9, 0.9)
    results = [
        align(x, 3),
        rho1_weights(x, x.square(), 1.0),
        keep_highest(x, valid, 0.5),
        dft_weights(x),
        entropy_weights(x, 7),
        gradient_norm(x, x, x),
        credit,
        lambda_returns(x, x, valid),
        *advantage_weights(x, 0.0, 1.0, 1.0, 0.1, 3.0),
        group_advantages(x),
        shuffle(w, every, generator),
        matched_random(w, every, generator),
        WeightStatistics.measure(w, every).sums,
    ]
    assert not any(result.requires_grad for result in results)


def test_nothing_waits_for_the_device() -> None:
    x, w = torch.rand(2, 6), torch.rand(2, 6, 3)
    labels, positions = torch.ones(2, 6, dtype=torch.int64), torch.arange(6).expand(2, 6)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # has no values: whatever would read one raises
    with mode:
        x, w, labels, positions = (mode.from_tensor(tensor) for tensor in (x, w, labels, positions))
        valid, every = valid_tokens(labels, positions), targets_of(labels, positions, 3) != NO_TARGET
        with pytest.raises(DataDependentOutputException):
            bool(valid.any())
        align(x, 3)
        rho1_weights(x, x, 1.0)
        keep_highest(x, valid, 0.3)
        gradient_norm(x, dft_weights(x), entropy_weights(x, 7))
        lambda_returns(advantages(x, x, valid, positions, 0.9, 0.9), x, valid)
        advantage_weights(x, 0.0, 1.0, 1.0, 0.1, 3.0)
        group_advantages(x)
        shuffle(w, every, torch.Generator())
        WeightStatistics.measure(w, every, every).over_ranks()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, valid: rho1_weights(x, x, 0.0), "temperature=0.0 must be positive"),
        (lambda x, valid: keep_highest(x, valid, 0.0), r"share=0.0 .* in \(0, 1\]"),
        (lambda x, valid: keep_highest(x, valid, 1.5), r"share=1.5 .* in \(0, 1\]"),
        (lambda x, valid: entropy_weights(x, 1), "vocab_size=1 must be at least 2"),
        (lambda x, valid: advantages(x, x, valid, None, 1.1, 0.5), r"gamma=1.1 must lie in \[0, 1\]"),
        (lambda x, valid: advantages(x, x, valid, None, 1.0, -0.5), r"lam=-0.5 must lie in \[0, 1\]"),
        (lambda x, valid: advantage_weights(x, 0.0, 1.0, 0.0, 0.1, 3.0), "beta=0.0 must be positive"),
        (lambda x, valid: advantage_weights(x, 0.0, 1.0, 1.0, 3.0, 0.1), "low=3.0 and high=0.1"),
        (lambda x, valid: group_advantages(x[:, :1]), "A group of 1 cannot be compared with itself"),
        (lambda x, valid: group_advantages(x, 0.0), "eps=0.0 must be positive"),
        (lambda x, valid: RunningMoments(0.0), r"momentum=0.0 must lie in \(0, 1\]"),
        (lambda x, valid: matched_random(x - 2, valid, torch.Generator()), "Signed weights"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_labels_without_a_target_are_refused() -> None:
    labels = torch.full((2, 5), IGNORED)
    require_targets(1, labels)
    with pytest.raises(ValueError, match=r"No label of shape \(2, 5\) is a target"):
        require_targets((labels != IGNORED).sum(), labels)
