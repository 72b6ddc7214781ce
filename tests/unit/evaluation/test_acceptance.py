"""Claim: the statistics of calls are pooled by counts, not by shares, and are told with their units."""

import pytest

from mull.decoding.generate import GenerationStats
from mull.evaluation.acceptance import acceptance_by_position, describe_call


def call(rounds: list[tuple[int, list[int]]], seconds: float = 0.5) -> GenerationStats:
    """Statistics of a call with these rounds: draft length, and tokens that each row gained."""
    stats = GenerationStats(prompt_tokens=7, think_iterations=1)
    for length, gained in rounds:
        stats.record(length, gained, gained, seconds, warm_up=False)
        stats.new_tokens += sum(gained)
    return stats


def test_acceptance_of_several_calls_is_that_of_all_their_drafts() -> None:
    long, short = call([(3, [4, 1]), (3, [2, 3])]), call([(0, [1]), (1, [1])])
    first, second, third = acceptance_by_position([long, short])
    assert first == (5, 5, 3)
    assert second == (4, 3, 2), "tested where the first was accepted, also where the call drafted no more"
    assert third == (4, 2, 1)
    assert second.conditional == pytest.approx(2 / 3)
    assert second.cumulative == pytest.approx(1 / 2)
    assert acceptance_by_position([call([(0, [1])])]) == []
    assert acceptance_by_position([]) == []


def test_cumulative_shares_of_a_fixed_length_sum_to_the_mean_accepted_length() -> None:
    stats = call([(3, [4, 1]), (3, [2, 3]), (3, [1, 1])])
    shares = [count.cumulative for count in acceptance_by_position([stats])]
    assert 1 + sum(shares) == pytest.approx(stats.mean_accepted_length)


def test_a_position_that_was_never_tested_has_a_share_of_zero() -> None:
    second = acceptance_by_position([call([(2, [1])])])[1]
    assert second == (1, 0, 0)
    assert second.conditional == second.cumulative == 0


def test_a_call_is_told_with_units_and_what_was_not_measured() -> None:
    stats = call([(0, [1]), (2, [3]), (2, [1])])
    told = describe_call(stats)
    assert told["rounds"] == "3 (1 with 0 drafts, 2 with 2 drafts)"
    assert told["speed"] == "3.3 tokens per second of decoding"
    assert told["mean accepted length"].startswith("1.67 tokens")
    assert told["speed-up"] == "not measured"
    stats.plain_seconds = 0.45
    assert describe_call(stats)["speed-up"].startswith("1.50 "), "five rounds of 0.45 s in 1.5 s"
    assert describe_call(call([(0, [1])]))["speed-up"] == "none: nothing was drafted"
    stats.think_iterations = None
    assert describe_call(stats)["think iterations"] == "of an explicit path"
