"""How many tokens to draft: from what rounds of each length cost, and from how many drafts the model accepts.

A round drafts K tokens, verifies them in one pass of the model and emits, in each row, the accepted ones and one more. With
``α_k`` the chance that the draft at position k is accepted if all before it were, and ``c_K`` the seconds of a round,

``tokens per second(K) = (1 + Σ_{k ≤ K} Π_{j ≤ k} α_j) / c_K``

(arXiv:2211.17192, equation 1 and theorem 3.8, which assume one α and known costs). The number of rows cancels. K = 0 is plain
decoding.

Heads that paused first have to run over what they missed, which can take longer than several rounds. That is earned back by a
better rate over the tokens that are left, or the pause goes on.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf

PLAIN_ROUNDS = 3
"""Plain rounds at the start; the first one of any length is not timed, because it also initialises and compiles."""

PRIOR_ACCEPTANCE = 0.6
"""Acceptance of the first position before any was seen."""

PRIOR_WEIGHT = 2.0
"""Drafts that the prior counts as."""

PRIOR_SLOPE = 0.25
"""Cost of a drafted and verified token in plain rounds, before any length was timed."""

MEMORY = 32
"""Rounds after which an observed acceptance counts 1/e."""

IDLE_WEIGHT = 2.0
"""Drafts that the acceptance of a position counts as after it was not observed for long, or once it has changed."""

FAST_MEMORY = 6
"""Rounds of the short average that detects a change of acceptance."""

SURPRISE = 2.5
"""Standard deviations of the short average from the long one that are a change."""

WINDOW = 9
"""Rounds of a length whose median is its cost."""

PACE_WINDOW, PACE_SAMPLES = 5, 3
"""Rounds whose median is the pace of the machine, and rounds that make a length's cost firm enough to tell it."""

SINGLE_TIME = 1.3
"""A length that was timed once is believed to cost at most this multiple of what the other lengths suggest."""

FIRST_SHARE, HIGHEST_SHARE, LOWEST_SHARE = 0.01, 0.05, 0.005
"""Share of the tokens that looking at longer, or at shorter lengths may cost: at first; after a look that found an improvement;
and after many that did not. Each of those halves it."""

LEAST_LOSS = 0.08
"""A look costs at least this share of a round, so that near ties are not tried all the time."""

CLOSER = 0.75
"""A look that shrinks a length's distance from the best one, in tokens per second, to this share is worth another one soon."""


class DraftLength:
    """Chooses how many tokens to draft in the next round, 0 included, and learns from every round.

    It starts with plain rounds, then takes the length with which the rest of the text is expected to take the least time. Now
    and then it takes the best of the longer, or of the shorter lengths instead: as often as the tokens that this is expected to
    lose stay within a small share of all. The share halves with every look that finds nothing better, down to a floor, and jumps
    up when one does: looks at useless heads are rare, and a change of the text is noticed.

    * Cost of a length: the lower median of its last rounds, relative to the pace of the machine at the time, which changes with
      its other work and the length of the text. The length in use tells the pace, and looks at others what they cost beside
      it. The first round of a length is left out. One in which the heads catch up on tokens that they missed counts only if it
      is low. Untimed lengths are interpolated, or continued with the slope of the timed ones. A length is not taken to cost
      more than a longer one: the odd times say so.
    * What catching up takes per position is measured, too. It is part of what a look costs, and as it is paid then, a second
      round of that length follows.
    * Acceptance of a position: a mean that forgets, drawn towards that of the position before. Two means of different memory
      disagree when the text changes; then the longer one is dropped.

    A choice is a function of its arguments and the rounds observed before: nothing is random.

    Args:
        longest: Tokens that may be drafted in a round; 0 if there is nothing to draft with.
        fixed: Always choose this length.

    Raises:
        ValueError: `fixed` is not between 0 and `longest`.
    """

    def __init__(self, longest: int, fixed: int | None = None) -> None:
        if fixed is not None and not 0 <= fixed <= longest:
            raise ValueError(
                f"draft_length={fixed} must lie between 0 and {longest}, the tokens that this model's heads can draft in a round."
            )
        self._longest = longest
        self._fixed = fixed
        self._positions = [_Position(PRIOR_WEIGHT if k == 0 else 0.0) for k in range(longest)]
        self._timings = [_Timing() for _ in range(longest + 1)]
        self._paces: deque[float] = deque(maxlen=PACE_WINDOW)
        self._round = 0
        self._shares = {"longer": FIRST_SHARE, "shorter": FIRST_SHARE}
        self._tokens: list[float] = []
        self._costs: list[float] = []
        self._rates: list[float] = []
        self._backlog: Sequence[int] = [0] * (longest + 1)
        self._best = 0
        self._next = 0
        self._again: int | None = None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Chance that the draft at each position, from the first, is accepted if all before it were."""
        found: list[float] = []
        before: float | None = None
        for position in self._positions:
            before = position.acceptance(before)
            found.append(before)
        return tuple(found)

    @property
    def seconds(self) -> dict[int, float]:
        """Measured cost of a round at the present pace, by draft length; lengths that were not timed are missing."""
        costs = {length: timing.cost for length, timing in enumerate(self._timings)}
        return {length: cost * _lower_median(self._paces) for length, cost in costs.items() if cost is not None}

    def choose(self, left: float = inf, backlog: Sequence[int] | None = None) -> int:
        """Tokens to draft in the next round.

        Args:
            left: Tokens that each row may still gain.
            backlog: Positions that the heads would have to catch up on first, for each length from 0; None for none.
        """
        if self._fixed is not None:
            return self._fixed
        self._backlog = backlog or [0] * (self._longest + 1)
        if self._rates:
            seconds = [1 / rate + self._catch_up(length) / left for length, rate in enumerate(self._rates)]
            self._best = seconds.index(min(seconds))
            self._next = self._best if self._again is None else self._again
            if self._next == self._best:
                self._next = self._due()
        return self._next

    def observe(self, length: int, accepted: Sequence[int], seconds: float, backlog: int = 0) -> None:
        """Learn from a finished round.

        Args:
            length: Tokens drafted in each row; it need not be the length that was chosen.
            accepted: How many of them were accepted, in each row that counts.
            seconds: Wall time of the whole round, from drafting to acceptance.
            backlog: Positions that the heads first caught up on, so that the time is not typical.
        """
        assert 0 <= length <= self._longest
        best, looked = self._best, length == self._next != self._best
        distance = self._distance(length) if looked else 0.0
        self._time(length, seconds, backlog)
        n_reached = len(accepted)
        for k, position in enumerate(self._positions):
            n_accepted = sum(n > k for n in accepted)
            position.observe(n_accepted, n_reached if k < length else 0)
            n_reached = n_accepted
        if self._timings[0].calls < PLAIN_ROUNDS or self._timings[0].cost is None:
            return
        self._rate()
        if looked:
            side = "longer" if length > best else "shorter"
            if self._distance(length) < CLOSER * distance:
                self._shares[side] = HIGHEST_SHARE
            elif not backlog:
                self._shares[side] = max(self._shares[side] / 2, LOWEST_SHARE)
        self._again = length if looked and backlog and not self._timings[length].is_certain else None

    def _time(self, length: int, seconds: float, backlog: int) -> None:
        """Take in a round's time, as a sign of the machine's pace or of what the length costs beside that."""
        self._round += 1
        timing = self._timings[length]
        timing.last = self._round
        timing.calls += 1
        if timing.calls == 1 or (backlog and timing.cost is None):
            return
        if not self._paces:
            self._paces.append(seconds)
        relative = seconds / _lower_median(self._paces)
        if backlog:
            assert timing.cost is not None
            timing.catch_ups.append(max(0.0, relative - timing.cost) / backlog)
            if relative >= timing.cost:
                return
        if length == self._best and len(timing.window) >= PACE_SAMPLES:
            assert timing.cost is not None
            self._paces.append(seconds / timing.cost)
        else:
            timing.window.append(relative)

    def _pause(self, length: int) -> int:
        """Rounds since all positions of a length were last drafted."""
        return self._round - max(timing.last for timing in self._timings[length:])

    def _rate(self) -> None:
        """Expected tokens of a round and row, cost of a round in units of the pace, and their ratio, by length."""
        self._costs = self._estimated_costs()
        self._tokens = [1.0]
        reached = 1.0
        for acceptance in self.acceptance:
            reached *= acceptance
            self._tokens.append(self._tokens[-1] + reached)
        self._rates = [tokens / cost for tokens, cost in zip(self._tokens, self._costs, strict=True)]

    def _distance(self, length: int) -> float:
        """Share of the best length's tokens per second that `length` is expected to miss."""
        return 1 - self._rates[length] / self._rates[self._best]

    def _estimated_costs(self) -> list[float]:
        plain = self._timings[0].cost
        assert plain is not None
        certain = [length for length, timing in enumerate(self._timings) if timing.is_certain]
        costs = [plain]
        last = 0  # the longest length so far whose cost was measured
        for length, timing in enumerate(self._timings[1:], 1):
            if timing.cost is not None and timing.is_certain:
                costs.append(timing.cost)
                last = length
                continue
            if longer := [each for each in certain if each > length]:
                end = self._timings[longer[0]].cost
                assert end is not None
                slope = (end - costs[last]) / (longer[0] - last)
            else:
                slope = max((costs[last] - plain) / last, 0.0) if last else PRIOR_SLOPE * plain
            likely = costs[last] + slope * (length - last)
            costs.append(likely if timing.cost is None else min(timing.cost, SINGLE_TIME * likely))
        for length in range(self._longest, 0, -1):
            costs[length - 1] = min(costs[length - 1], costs[length])
        return costs

    def _due(self) -> int:
        """The best length, or another one that a look is due at."""
        best = self._best
        sides = {"longer": range(best + 1, self._longest + 1), "shorter": range(best)}
        for side, lengths in sides.items():
            if not lengths:
                continue
            length = max(lengths, key=self._rates.__getitem__)
            pause = self._pause(length) if side == "longer" else self._round - self._timings[length].last
            if pause * self._tokens[best] * self._shares[side] >= self._loss(length):
                return length
        return best

    def _loss(self, length: int) -> float:
        """Tokens per row that a round of `length` is expected to lose against the best length in the same time."""
        best = self._best
        seconds = self._costs[length] + self._catch_up(length)
        return max(seconds * self._rates[best] - self._tokens[length], LEAST_LOSS * self._tokens[best])

    def _catch_up(self, length: int) -> float:
        """What the heads need before a round of `length`; where it was not measured, as much as with other lengths."""
        if not self._backlog[length]:
            return 0.0
        known = [timing.catch_up for timing in self._timings if timing.catch_up is not None]
        own = self._timings[length].catch_up
        return self._backlog[length] * (max(known, default=0.0) if own is None else own)


class _Timing:
    """What rounds of one length cost, in units of the pace."""

    def __init__(self) -> None:
        self.calls = 0
        self.last = 0
        """Number of the last round of this length, from 1."""

        self.window: deque[float] = deque(maxlen=WINDOW)
        self.catch_ups: deque[float] = deque(maxlen=5)
        """What it took more when the heads had a backlog, by position of that."""

    @property
    def cost(self) -> float | None:
        """None before the length was timed."""
        return _lower_median(self.window) if self.window else None

    @property
    def is_certain(self) -> bool:
        """Whether one odd round cannot have made the cost."""
        return len(self.window) > 1

    @property
    def catch_up(self) -> float | None:
        """Cost of a position to catch up on, or None before it was timed."""
        return _lower_median(self.catch_ups) if self.catch_ups else None


class _Position:
    """How often drafts at one position were accepted, of those that were reached.

    Args:
        weight: Drafts that the prior counts as. With 0, the estimate is that of the position before until there is evidence.
    """

    def __init__(self, weight: float) -> None:
        self._n_accepted = PRIOR_ACCEPTANCE * weight
        self._n_reached = weight
        self._short_mean = PRIOR_ACCEPTANCE

    def acceptance(self, before: float | None) -> float:
        """The estimate; that of the position before counts as one draft."""
        if before is None:
            return self._n_accepted / self._n_reached
        return (self._n_accepted + before) / (self._n_reached + 1)

    def observe(self, n_accepted: int, n_reached: int) -> None:
        """Take in a round; without a row that reached the position, its evidence fades, and the mean stays."""
        keep = 1 - 1 / MEMORY
        if n_reached:
            self._n_accepted = keep * self._n_accepted + n_accepted
            self._n_reached = keep * self._n_reached + n_reached
            self._detect_change(n_accepted / n_reached, n_reached)
        elif self._n_reached > IDLE_WEIGHT:
            keep = max(keep, IDLE_WEIGHT / self._n_reached)
            self._n_accepted *= keep
            self._n_reached *= keep

    def _detect_change(self, share: float, n_rows: int) -> None:
        """Start anew from the short average where the long one cannot explain it."""
        mean = self._n_accepted / self._n_reached
        if self._n_reached <= FAST_MEMORY * n_rows:
            self._short_mean = mean  # there is no older evidence to disagree with
            return
        gain = 1 / FAST_MEMORY
        self._short_mean += gain * (share - self._short_mean)
        # Rows are not independent, and a variance near 0 would make any event a change.
        variance = max(mean * (1 - mean) / min(n_rows, 4), 0.02) * gain / (2 - gain)
        if (self._short_mean - mean) ** 2 > SURPRISE**2 * variance:
            self._n_accepted, self._n_reached = self._short_mean * IDLE_WEIGHT, IDLE_WEIGHT


def _lower_median(values: Iterable[float]) -> float:
    """The median; of an even number of values the lower one in the middle: delays are more common than rounds too short."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
