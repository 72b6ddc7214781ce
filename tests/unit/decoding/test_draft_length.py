"""Claim: drafting is never much slower than not drafting, and nearly as fast as with the best fixed length.

Worlds with known costs and acceptance stand in for models. A plain round takes 1 second. Observed times are noisy, with outliers,
and the first round of a length takes 4 seconds more; what a call costs is counted without that noise.
"""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, product
from math import inf
from operator import mul
from statistics import mean, median

import pytest

from mull.decoding.draft_length import DraftLength

LONGEST = 3
TOKENS = 256

PROFILES = {
    "zero": [0.0] * 3,
    "useless": [0.08, 0.05, 0.05],
    "vanilla": [0.7, 0.16, 0.18],  # the conditional acceptances of FastMTP (arXiv:2509.18362), before and
    "good": [0.81, 0.69, 0.64],  # after its training
    "great": [0.93, 0.9, 0.88],
}


def straight(verify_four: float, draft: float, longest: int = LONGEST) -> list[float]:
    """Costs by length: verifying grows steadily, and so does drafting."""
    return [1 + (verify_four - 1) * k / 3 + draft * k for k in range(longest + 1)]


def jump(verify_four: float, draft: float) -> list[float]:
    """Verifying two tokens costs nearly what verifying four does, as where another kernel is used from two on."""
    return [1.0, *(1 + (verify_four - 1) * (0.8 + k / 15) + draft * k for k in range(1, LONGEST + 1))]


def hump(verify_four: float, draft: float) -> list[float]:
    """Verifying four tokens is cheaper than two or three, as measured in fp32 on CPUs."""
    verify = [1.0, 1 + (verify_four - 1) * 1.2, 1 + (verify_four - 1) * 1.5, verify_four]
    return [cost + draft * k for k, cost in enumerate(verify)]


TABLES = [
    make(verify_four, draft)
    for make, verify_four, draft in product((straight, jump, hump), (1.05, 1.3, 1.6), (0.1, 0.25))
]


class World:
    """A model with given costs by draft length and acceptance by position. A call ends when its slowest row has ended.

    Args:
        costs: Seconds of a round, by length.
        acceptance: Probability that each draft is accepted if those before it were.
        seed: Of everything that is random.
        rows: Rows of a batch.
        spread: Rows differ in each call: their acceptance is lower by a share of up to `spread`.
        catch_up: Seconds that a head takes to run over a position that it missed.
    """

    prompt = 64

    def __init__(
        self,
        costs: Sequence[float],
        acceptance: Sequence[float],
        seed: int,
        rows: int = 1,
        spread: float = 0.0,
        catch_up: float = 0.001,
    ) -> None:
        self.costs, self.acceptance, self.spread, self.catch_up = costs, acceptance, spread, catch_up
        self.random = random.Random(seed)
        self.pace: Callable[[float], float] = lambda tokens: 1.0
        self.recursive = False
        """Whether all drafts come from one head, so that it misses nothing while there are any."""
        self.tokens = 0.0
        self._rows = [0] * rows
        self._skill = [1.0] * rows
        self._known: set[int] = set()
        self._missed = [self.prompt] * (len(costs) - 1)

    def round(self, policy: DraftLength, n_tokens: float = inf) -> tuple[int, float]:
        """Length, and seconds without noise."""
        missed = [max(self._missed[:length], default=0) for length in range(len(self.costs))]
        backlog = [positions if positions > 2 * LONGEST else 0 for positions in missed]
        running = [row for row, n in enumerate(self._rows) if n < n_tokens]
        length = policy.choose([n_tokens - self._rows[row] for row in running], backlog)
        accepted = {row: self._accepted(row, length) for row in running}
        seconds = self.costs[length] + self.catch_up * length * backlog[length]
        gained = 1 + round(mean(accepted.values()))
        n_run = len(self._missed) if self.recursive and length else length
        self._missed = [0 if head < n_run else positions + gained for head, positions in enumerate(self._missed)]
        first = 0.0 if length in self._known else 4.0
        self._known.add(length)
        noise = max(0.3, self.random.gauss(1, 0.1)) * (5 if self.random.random() < 0.02 else 1)
        least = min(self._rows[row] for row in running)
        last = [accepted[row] for row in running if self._rows[row] == least]
        policy.observe(length, last, (seconds + first) * noise * self.pace(self.tokens), backlog[length])
        for row, n in accepted.items():
            self._rows[row] += 1 + n
        self.tokens += 1 + mean(accepted.values())
        return length, seconds

    def _accepted(self, row: int, length: int) -> int:
        chances = [self._skill[row] * chance for chance in self.acceptance[:length]]
        return next((k for k, chance in enumerate(chances) if self.random.random() >= chance), length)

    def call(self, policy: DraftLength, n_tokens: int = TOKENS) -> tuple[float, list[int]]:
        """Seconds per token of the slowest row, and the lengths taken."""
        lengths, seconds = [], 0.0
        self._missed = [self.prompt] * (len(self.costs) - 1)
        self._rows = [0 for _ in self._rows]
        self._skill = [1 - self.spread * self.random.random() for _ in self._rows]
        while min(self._rows) < n_tokens:
            length, cost = self.round(policy, n_tokens)
            lengths.append(length)
            seconds += cost
        return seconds / min(self._rows), lengths


def best(costs: Sequence[float], acceptance: Sequence[float], prompt: float = 0.0) -> float:
    """Seconds per token of the best fixed length, 0 included, if a head runs over the prompt in `prompt` seconds a token."""
    tokens = accumulate(accumulate(acceptance, mul), initial=1.0)
    return min(cost / expected + k * prompt for k, (cost, expected) in enumerate(zip(costs, tokens, strict=True)))


def regrets(name: str, costs: Sequence[float], n_seeds: int = 10, catch_up: float = 0.001) -> tuple[float, float]:
    """Mean excess over the best fixed length, of the first call and of the second one."""
    acceptance = PROFILES[name]
    found = []
    for seed in range(n_seeds):
        world, policy = World(costs, acceptance, seed, catch_up=catch_up), DraftLength(LONGEST)
        least = best(costs, acceptance, catch_up * world.prompt / TOKENS)
        found.append([world.call(policy)[0] / least - 1 for _ in range(2)])
    first, second = zip(*found, strict=True)
    return mean(first), mean(second)


@pytest.mark.parametrize("name", ["zero", "useless"])
@pytest.mark.latin(2, "name")
def test_useless_heads_cost_a_few_percent_of_the_first_call_and_one_of_the_second(name: str) -> None:
    for catch_up, usual, worst in ((0.001, 0.02, 0.03), (0.02, 0.035, 0.055)):
        found = [regrets(name, costs, n_seeds=4, catch_up=catch_up) for costs in TABLES]
        assert mean(first for first, _ in found) < usual
        assert max(first for first, _ in found) < worst
        assert mean(second for _, second in found) < 0.01
        assert max(second for _, second in found) < 0.015


@pytest.mark.parametrize("name", ["vanilla", "good", "great"])
@pytest.mark.latin(3, "name")
def test_useful_heads_are_used_nearly_as_well_as_with_the_best_fixed_length(name: str) -> None:
    found = [regrets(name, costs) for costs in TABLES]
    assert mean(first for first, _ in found) < 0.055
    assert max(first for first, _ in found) < 0.12
    assert mean(second for _, second in found) < 0.025
    assert max(second for _, second in found) < 0.08


BATCH_COSTS = {"cheap": [1.0, 1.13, 1.27, 1.4], "even": [1.0, 1.5, 2.0, 2.4], "expensive": [1.0, 1.5, 2.2, 2.9]}
"""Eight rows: drafts nearly free, as on a GPU; or as measured on two CPU cores, where one draft is about as fast as none."""


def batch(
    policy: DraftLength, name: str, costs: Sequence[float], seed: int, n_tokens: int, spread: float
) -> list[float]:
    """Speed over plain decoding of five calls."""
    catch_up = 0.004 if costs == BATCH_COSTS["cheap"] else 0.016
    world = World(costs, PROFILES[name], seed, rows=8, spread=spread, catch_up=catch_up)
    return [1 / world.call(policy, n_tokens)[0] for _ in range(5)]


@pytest.mark.parametrize("name", ["zero", "vanilla", "good", "great"])
@pytest.mark.parametrize("costs", BATCH_COSTS)
@pytest.mark.latin(8, "name", "costs")
def test_a_batch_that_waits_for_its_slowest_row_loses_little_and_gains_where_drafts_pay(costs: str, name: str) -> None:
    for n_tokens, spread in ((64, 0.0), (64, 0.5), (256, 0.3)):
        found, fixed = [], [[] for _ in range(1 + LONGEST)]
        for seed in range(4):
            found.append(mean(batch(DraftLength(LONGEST), name, BATCH_COSTS[costs], seed, n_tokens, spread)[1:]))
            for length, speeds in enumerate(fixed):
                speeds += batch(DraftLength(LONGEST, fixed=length), name, BATCH_COSTS[costs], seed, n_tokens, spread)
        assert mean(found) > 0.97, "against plain decoding"
        assert min(found) > 0.94, "against plain decoding, in the worst of all"
        assert mean(found) > 0.92 * max(map(mean, fixed)), "against the best fixed length"


@pytest.mark.parametrize("name", ["zero", "useless"])
@pytest.mark.latin(2, "name")
def test_heads_that_become_useless_are_given_up_within_a_few_rounds(name: str) -> None:
    for costs in TABLES:
        found = []
        for seed in range(8):
            world, policy = World(costs, PROFILES["great"], seed), DraftLength(LONGEST)
            world.call(policy)
            world.acceptance = PROFILES[name]
            found.append(world.call(policy)[0] - 1)
        assert mean(found) < 0.055


def test_heads_that_become_useful_are_found() -> None:
    found = []
    for costs, seed in product(TABLES[::2], range(6)):
        world, policy = World(costs, PROFILES["zero"], seed), DraftLength(LONGEST)
        world.call(policy)
        world.acceptance = PROFILES["great"]
        _, lengths = world.call(policy)
        found.append(next((place for place, pair in enumerate(pairwise(lengths)) if all(pair)), TOKENS))
    assert median(found) < 90, "rounds until half of them draft again"


def test_probes_of_useless_heads_are_rare() -> None:
    for costs in TABLES[:2]:
        world, policy = World(costs, PROFILES["zero"], seed=0), DraftLength(LONGEST)
        lengths = [world.round(policy)[0] for _ in range(4000)]
        assert sum(costs[length] - 1 for length in lengths) < 0.01 * 4000


@pytest.mark.slow
def test_a_machine_that_changes_its_pace_misleads_neither_towards_useless_heads_nor_away_from_good_ones() -> None:
    paces: list[Callable[[float], float]] = [
        lambda tokens: 1 + tokens / 2000,
        lambda tokens: 1 + (int(tokens) // 50 % 2),
    ]
    for pace, (name, limit) in product(paces, (("zero", 0.01), ("good", 0.04))):
        found = []
        for costs, seed in product(TABLES, range(4)):
            world, policy = World(costs, PROFILES[name], seed), DraftLength(LONGEST)
            world.pace = pace
            world.call(policy)
            found.append(world.call(policy)[0] / best(costs, PROFILES[name]) - 1)
        assert mean(found) < limit


def test_a_length_after_two_that_do_not_pay_is_found() -> None:
    costs = hump(1.6, 0.25)
    assert costs[1] > 1 + PROFILES["great"][0], "a single draft does not pay, even if it is accepted"
    for seed in range(8):
        world, policy = World(costs, PROFILES["great"], seed), DraftLength(LONGEST)
        world.call(policy)
        lengths = world.call(policy)[1]
        assert lengths.count(3) > 0.75 * len(lengths)


def test_more_drafts_are_taken_only_where_they_pay() -> None:
    costs = straight(1.3, 0.1, longest=7)
    for acceptance, wanted in (([0.95] * 7, {6, 7}), ([0.9, 0.9, 0.05, 0.05, 0.05, 0.05, 0.05], {2})):
        taken, excess = [], []
        for seed in range(6):
            world, policy = World(costs, acceptance, seed), DraftLength(7)
            world.recursive = True
            world.call(policy)
            seconds, lengths = world.call(policy)
            taken += lengths
            excess.append(seconds / best(costs, acceptance) - 1)
        assert sum(length in wanted for length in taken) > 0.75 * len(taken)
        assert mean(excess) < 0.025


def feed(policy: DraftLength, rounds: int, *, accepted: int = 0, seconds: Callable[[int], float]) -> list[int]:
    """Rounds without noise, of one row."""
    lengths = []
    for _ in range(rounds):
        length = policy.choose()
        policy.observe(length, [min(accepted, length)], seconds(length))
        lengths.append(length)
    return lengths


def test_it_measures_plain_rounds_first_and_soon_drafts_where_that_pays() -> None:
    lengths = feed(DraftLength(3), 40, accepted=3, seconds=lambda k: 1 + k / 4)
    assert not any(lengths[:2])
    assert all(lengths[4:10])
    assert lengths[20:].count(3) > 15


def test_the_first_round_of_a_length_is_not_timed() -> None:
    policy = DraftLength(2)
    policy.observe(0, [0], 90.0)
    assert policy.seconds == {}
    policy.observe(0, [0], 1.0)
    policy.observe(1, [1], 100.0)
    assert policy.seconds == {0: 1.0}
    policy.observe(1, [1], 1.5)
    assert policy.seconds == {0: 1.0, 1: 1.5}


def test_delays_do_not_move_a_cost() -> None:
    policy = DraftLength(1)
    for seconds in (9.0, 1.0, 5.0, 1.2, 5.0, 1.1):
        policy.observe(0, [0], seconds)
    assert 1.0 <= policy.seconds[0] <= 1.2


def test_one_delay_does_not_rule_a_length_out() -> None:
    policy = DraftLength(1)
    feed(policy, 6, accepted=1, seconds=lambda k: 1 + k / 4)
    policy.observe(1, [1], 9.0)
    assert sum(feed(policy, 20, accepted=1, seconds=lambda k: 1 + k / 4)) > 15


def test_rounds_in_which_idle_heads_catch_up_do_not_make_drafting_look_expensive() -> None:
    policy = DraftLength(1)
    for _ in range(4):
        policy.observe(0, [0], 1.0)
        policy.observe(1, [1], 1.3)
    for _ in range(6):
        for _ in range(20):
            policy.observe(0, [0], 1.0)
        policy.observe(1, [1], 4.0, backlog=20)
    assert policy.seconds == pytest.approx({0: 1.0, 1: 1.3})
    assert policy.choose() == 1, "without a backlog"


def test_heads_catch_up_only_if_the_tokens_that_are_left_earn_it_back() -> None:
    policy = DraftLength(1)
    for _ in range(30):
        policy.observe(0, [0], 1.0)
        policy.observe(1, [1], 1.5)
    for _ in range(3):
        policy.observe(1, [1], 1.5 + 100 * 0.1, backlog=100)
    assert policy.choose() == 1
    assert policy.choose([20], [0, 0]) == 1
    assert policy.choose([20], [0, 100]) == 0, "10 seconds to catch up, for 5 that drafts would save"
    assert policy.choose([80], [0, 100]) == 1
    assert policy.choose([20], [0, 10]) == 1


def test_a_batch_drafts_less_than_a_row_alone_because_it_waits_for_the_slowest() -> None:
    policy = DraftLength(1)
    for _ in range(40):
        policy.observe(0, [0], 1.0)
        policy.observe(1, [1, 1, 0], 1.55)
    assert policy.choose([30]) == 1, "1.67 tokens in 1.55 seconds"
    assert policy.choose([30] * 8) == 0, "the slowest of eight gains less"
    assert policy.choose([30] + [10] * 7) == 1, "here the slowest row is known already"
    assert policy.choose([3000] * 8) == 1, "in long texts rows differ less"


def test_costs_of_different_age_are_compared_at_the_same_pace() -> None:
    """Plain rounds and drafts were timed in a fast moment. Now the machine is slow, as only plain rounds have shown."""
    policy = DraftLength(1)
    for _ in range(30):
        policy.observe(0, [0], 1.0)
    for _ in range(3):
        policy.observe(1, [0], 1.4)
    feed(policy, 30, seconds=lambda k: 2 * (1 + 0.4 * k))
    assert policy.choose() == 0
    assert policy.seconds == pytest.approx({0: 2.0, 1: 2.8})


def test_acceptance_is_that_of_the_drafts_whose_predecessors_were_accepted() -> None:
    policy = DraftLength(3)
    for _ in range(100):
        policy.observe(3, [0] + [1] * 9 + [2] * 2 + [3] * 8, 1.3)
    assert policy.acceptance == pytest.approx((19 / 20, 10 / 19, 8 / 10), abs=0.03)


def test_acceptance_of_a_position_that_is_not_drafted_stays_until_there_is_news() -> None:
    policy = DraftLength(2)
    for _ in range(50):
        policy.observe(2, [2, 1, 2, 1], 1.0)
    known = policy.acceptance
    assert known == pytest.approx((1.0, 0.5), abs=0.02)
    for _ in range(200):
        policy.observe(0, [0] * 4, 1.0)
    assert policy.acceptance == pytest.approx(known, abs=0.2)
    policy.observe(2, [2, 2, 2, 2], 1.0)
    assert policy.acceptance[1] > 0.7, "old evidence weighs little against new"


def test_positions_that_were_never_drafted_are_taken_to_be_like_those_before() -> None:
    policy = DraftLength(3)
    for _ in range(100):
        policy.observe(1, [1], 1.0)
    assert policy.acceptance == pytest.approx((1.0, 1.0, 1.0), abs=0.05)


def test_a_fixed_length_is_always_chosen_and_still_measured() -> None:
    policy = DraftLength(3, fixed=2)
    assert feed(policy, 50, seconds=lambda k: 1.0 + k) == [2] * 50
    assert policy.seconds == {2: 3.0}, "and no plain round that was never run"
    assert policy.acceptance[0] < 0.05
    assert feed(DraftLength(3, fixed=0), 5, seconds=lambda k: 1.0) == [0] * 5


@pytest.mark.parametrize("fixed", [-1, 4])
def test_a_fixed_length_that_the_heads_cannot_draft_is_refused(fixed: int) -> None:
    with pytest.raises(
        ValueError, match=f"draft_length={fixed} must lie between 0 and 3, the tokens that this model's heads"
    ):
        DraftLength(3, fixed=fixed)


def test_without_anything_to_draft_with_every_round_is_plain() -> None:
    policy = DraftLength(0)
    assert feed(policy, 20, seconds=lambda k: 1.0) == [0] * 20
    assert policy.acceptance == ()
    assert policy.seconds == {0: 1.0}


def test_choosing_is_a_function_of_the_rounds_before() -> None:
    histories = []
    for _ in range(2):
        world, policy = World(TABLES[0], PROFILES["good"], seed=3), DraftLength(LONGEST)
        histories.append(world.call(policy)[1])
        assert policy.choose() == policy.choose()
    assert histories[0] == histories[1]


def test_shorter_rounds_at_the_end_of_a_text_and_rows_that_ended_do_no_harm() -> None:
    world, policy = World(straight(1.3, 0.1), PROFILES["great"], seed=0, rows=4), DraftLength(LONGEST)
    for _ in range(20):
        world.call(policy, 40)
        for length in (2, 1, 0):
            policy.observe(length, [length] * (length + 1), world.costs[length])
        policy.observe(0, [], 1.0)
    calls = [world.call(policy)[0] for _ in range(3)]
    best_calls = [world.call(DraftLength(LONGEST, fixed=3))[0] for _ in range(3)]
    assert mean(calls) < 1.05 * mean(best_calls)


def test_a_probe_that_finds_accepted_drafts_is_soon_repeated() -> None:
    policy = DraftLength(1)
    feed(policy, 1500, seconds=lambda k: 1 + 0.45 * k)
    lengths = feed(policy, 400, accepted=1, seconds=lambda k: 1 + 0.45 * k)
    first = lengths.index(1)
    assert first < 200
    assert sum(lengths[first : first + 60]) > 45


def test_plain_rounds_that_were_timed_in_a_slow_moment_are_timed_again() -> None:
    policy = DraftLength(1)
    feed(policy, 3, seconds=lambda k: 3.0)
    feed(policy, 120, seconds=lambda k: 1 + 0.45 * k)
    assert sum(feed(policy, 100, seconds=lambda k: 1 + 0.45 * k)) < 10
