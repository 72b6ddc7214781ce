"""How many tokens to draft: as many as let the slowest row of the batch end soonest.

A round drafts K tokens, verifies them in one pass, and gives each row its accepted drafts and one token more. Let ``α_k`` be the
probability that draft k is accepted if all before it were. A row then gains ``n`` tokens in a round, with mean and variance

``E n = Σ_{k = 0..K} r_k``,  ``E n² = Σ_k (2k + 1) r_k``,  ``r_k = α_1 ⋯ α_k``

(arXiv:2211.17192, equation 1, has one α and no variance). A batch ends with its slowest row: of m equal rows, that one has about
``R E n - z_m √(R Var n)`` tokens after R rounds, where ``z_m`` is the expected maximum of m standard normal numbers.
"""

from collections import deque
from collections.abc import Sequence
from math import inf, sqrt
from statistics import NormalDist, median_low

PLAIN_ROUNDS = 3
"""Rounds without drafts at the start. The first round of every length is not timed, because it also initialises and compiles."""

COST_WINDOW, PACE_WINDOW = 9, 5
"""Rounds whose median is the cost of a length, and rounds whose median is the pace of the machine."""

PRIOR_ACCEPTANCE, PRIOR_COST = 0.6, 0.25
"""Acceptance of the first draft, and cost of a draft in plain rounds, before either was measured."""

MEMORY, RECENT = 32, 4
"""Rounds over which observed acceptance is averaged, and rounds of the short average that detects a change."""

CHANGE = 0.5
"""Difference between the two averages from which the short one counts."""

OLD_EVIDENCE = 2.0
"""Rounds that the prior counts as, and all evidence on a position that has not been drafted for long."""

PROBE_SHARE = 0.01
"""Share of the time that probes of longer lengths, and those of shorter ones, may cost."""

LEAST_LOSS = 0.05
"""Cost of any probe in plain rounds, at least: near ties need not be decided again and again."""


class DraftLength:
    """Chooses how many tokens to draft in the next round, 0 included, and learns from every round.

    1. It starts with plain rounds. From then on it takes the length with the least expected time until the last row ends:
       rounds needed, times the cost of a round, plus the time in which idle heads catch up on positions that they missed.
    2. The cost of a length is the median time of its last rounds, relative to the pace of the machine. The length in use sets
       the pace, so costs that were measured at different times compare. A length that was not timed twice is expected to cost
       as much as the next shorter one plus `PRIOR_COST`.
    3. The acceptance of a position is an average that forgets. If a short average contradicts it, the text has changed, and
       the short one counts.
    4. Now and then it probes the best of the shorter lengths, or of the longer ones: as often as the expected loss stays within
       `PROBE_SHARE` of the time. Probes of useless heads are therefore rare.

    Nothing is random: a choice depends on its arguments and the rounds observed before.

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
        self._fixed = fixed
        self._lengths = range(longest + 1)
        self._positions = [_Position(OLD_EVIDENCE if k == 0 else 0.0) for k in range(longest)]
        self._costs: list[deque[float]] = [deque(maxlen=COST_WINDOW) for _ in self._lengths]
        self._costs[0].extend([1.0, 1.0])  # a plain round is the unit
        self._pace: deque[float] = deque(maxlen=PACE_WINDOW)
        self._catch_up: deque[float] = deque([0.0], maxlen=PACE_WINDOW)  # per position
        self._n_rounds = 0
        self._n_runs = [0 for _ in self._lengths]
        self._last_run = [0 for _ in self._lengths]
        self._best = self._next = 0
        self._repeated: int | None = None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Probability that the draft at each position, from the first, is accepted if all before it were."""
        found: list[float] = []
        for position in self._positions:
            found.append(position.acceptance(found[-1] if found else None))
        return tuple(found)

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of a round at the present pace, by draft length; lengths that were not timed are missing."""
        timed = [length for length in self._lengths if self._n_runs[length] > 1 and self._costs[length]]
        return {length: median_low(self._costs[length]) * median_low(self._pace) for length in timed if self._pace}

    def choose(self, left: Sequence[float] = (inf,), backlog: Sequence[int] | None = None) -> int:
        """Tokens to draft in the next round.

        Args:
            left: Tokens that each running row may still gain.
            backlog: Positions that the heads would have to catch up on first, for each length from 0; None for none.
        """
        if self._fixed is not None:
            return self._fixed
        if self._n_runs[0] < PLAIN_ROUNDS:
            return 0
        catch_up = [median_low(self._catch_up) * positions for positions in backlog or [0 for _ in self._lengths]]
        costs, tokens, most_left = self._expected_costs(), self._expected_tokens(left), max(left)
        per_token = [cost / n for cost, n in zip(costs, tokens, strict=True)]
        least = [time + extra / most_left for time, extra in zip(per_token, catch_up, strict=True)]
        self._best = least.index(min(least))
        losses = [costs[k] + catch_up[k] - tokens[k] * per_token[self._best] for k in self._lengths]
        self._next = self._probe(losses) if self._repeated is None else self._repeated
        return self._next

    def _probe(self, losses: Sequence[float]) -> int:
        """A length that is due for a probe, or the best one. `losses` are expected, in plain rounds, against the best."""
        for side in (self._lengths[self._best + 1 :], self._lengths[: self._best]):
            if side:
                length = min(side, key=losses.__getitem__)
                pause = self._n_rounds - self._last_run[length]
                if max(losses[length], LEAST_LOSS) <= PROBE_SHARE * pause:
                    return length
        return self._best

    def observe(self, length: int, accepted: Sequence[int], seconds: float, backlog: int = 0) -> None:
        """Learn from a finished round.

        Args:
            length: Tokens drafted in each row; it need not be the length that was chosen.
            accepted: How many of them were accepted, in each row that counts.
            seconds: Wall time of the whole round, from drafting to acceptance.
            backlog: Positions that the heads first caught up on.
        """
        assert length in self._lengths
        # Each round counts once. Level rows at the start of a call would otherwise outweigh the slow one that is alone later.
        n_rows = max(len(accepted), 1)
        reached = len(accepted) / n_rows
        for k, position in enumerate(self._positions):
            share = sum(n > k for n in accepted) / n_rows
            position.observe(share, reached if k < length else 0.0)
            reached = share
        self._n_rounds += 1
        self._n_runs[length] += 1
        self._last_run[length] = self._n_rounds
        if self._n_runs[length] > 1:
            self._time(length, seconds, backlog)
        # Having paid for catching up, run a probed length again: only a round without a backlog tells its cost.
        probed = length == self._next != self._best
        self._repeated = length if probed and backlog and len(self._costs[length]) < 2 else None

    def _time(self, length: int, seconds: float, backlog: int) -> None:
        costs = self._costs[length]
        if not self._pace:
            self._pace.append(seconds)
        elif backlog:
            if costs:
                extra = seconds / median_low(self._pace) - median_low(costs)
                self._catch_up.append(max(extra, 0.0) / backlog)
        elif length == self._best and (length == 0 or len(costs) >= PACE_WINDOW):
            self._pace.append(seconds / median_low(costs))
        else:
            costs.append(seconds / median_low(self._pace))

    def _expected_costs(self) -> list[float]:
        """Cost of a round in plain rounds, by length."""
        found = [median_low(self._costs[0])]
        for costs in self._costs[1:]:
            # Of two times the lower one counts, so a single delay cannot rule a length out.
            found.append(median_low(costs) if len(costs) > 1 else found[-1] + PRIOR_COST * found[0])
        return found

    def _expected_tokens(self, left: Sequence[float]) -> list[float]:
        """Tokens per round, by length, of the row that is expected to end last."""
        reached = mean = square = 1.0
        found = [1.0]
        for k, acceptance in enumerate(self.acceptance, 1):
            reached *= acceptance
            mean += reached
            square += (2 * k + 1) * reached
            found.append(_tokens_of_slowest(mean, sqrt(max(square - mean**2, 0.0)), left))
        return found


def _tokens_of_slowest(mean: float, deviation: float, left: Sequence[float]) -> float:
    """Tokens per round until the last row ends. Each gains `mean ± deviation` tokens a round; `left` are still to be gained."""
    ordered = sorted(left, reverse=True)
    if ordered[0] == inf:
        return mean
    n_rounds = 0.0
    n_rows = 1
    while True:
        # The 1, 2, 4, ... rows with the most left, all taken to have as much left as the last of them.
        n_rows = min(n_rows, len(ordered))
        spread = deviation * _expected_maximum(n_rows)
        # Solves R mean - spread √R = tokens left.
        root = (spread + sqrt(spread**2 + 4 * mean * ordered[n_rows - 1])) / (2 * mean)
        n_rounds = max(n_rounds, root**2)
        if n_rows == len(ordered):
            return ordered[0] / n_rounds
        n_rows *= 2


def _expected_maximum(n: int) -> float:
    """Of `n` standard normal numbers, by Blom's approximation; 0 for one."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25))


class _Position:
    """How often drafts at one position were accepted, of those whose predecessors were.

    Args:
        weight: Rounds that the prior counts as. With 0, the estimate is that of the position before until there is evidence.
    """

    def __init__(self, weight: float) -> None:
        self._accepted, self._reached = PRIOR_ACCEPTANCE * weight, weight
        self._recent: float | None = None

    def acceptance(self, before: float | None) -> float:
        """The estimate; that of the position before counts as one round."""
        if before is None:
            mean = self._accepted / self._reached
        else:
            mean = (self._accepted + before) / (self._reached + 1)
        return mean if self._recent is None or abs(self._recent - mean) <= CHANGE else self._recent

    def observe(self, accepted: float, reached: float) -> None:
        """Learn from a round, given shares of rows. Where none reached the position, its evidence loses weight, not its mean."""
        keep = 1 - 1 / MEMORY
        if reached:
            if self._recent is None:
                self._recent = self._accepted / self._reached if self._reached else accepted / reached
            self._recent += (accepted / reached - self._recent) / RECENT
            self._accepted = keep * self._accepted + accepted
            self._reached = keep * self._reached + reached
        elif self._reached > OLD_EVIDENCE:
            keep = max(keep, OLD_EVIDENCE / self._reached)
            self._accepted *= keep
            self._reached *= keep
