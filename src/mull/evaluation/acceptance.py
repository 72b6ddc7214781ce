"""Summaries of `GenerationStats`: acceptance over several calls, and one call in words."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from mull.decoding.generate import GenerationStats


class Acceptance(NamedTuple):
    """Counts of drafts at one position of a round, over rounds and running rows."""

    drafted: int
    """How often a token was drafted there."""

    verified: int
    """Of these, those whose predecessors were all accepted."""

    accepted: int
    """Of these, those that were accepted."""

    @property
    def conditional(self) -> float:
        """Share of the verified drafts that were accepted; 0 if there were none."""
        return self.accepted / self.verified if self.verified else 0.0

    @property
    def cumulative(self) -> float:
        """Share of all drafts that were accepted, which requires that all before them were.

        With a fixed draft length, 1 plus their sum over the positions is the mean accepted length.
        """
        return self.accepted / self.drafted if self.drafted else 0.0


def acceptance_by_position(calls: Sequence[GenerationStats]) -> list[Acceptance]:
    """Counts of all calls together, from the first drafted position on; empty if nothing was drafted."""
    by_call = [zip(call.drafted, call.verified, call.accepted, strict=True) for call in calls]
    positions = zip_longest(*by_call, fillvalue=(0, 0, 0))
    return [Acceptance(*map(sum, zip(*counts, strict=True))) for counts in positions]


def describe_call(stats: GenerationStats) -> dict[str, str]:
    """The statistics of a call in words, with units, by name. Acceptance by position is left out."""
    rounds = ", ".join(f"{count} with {length} drafts" for length, count in sorted(stats.draft_lengths.items()))
    speedup = "not measured" if stats.speedup is None else f"{stats.speedup:.2f} over rounds without drafts"
    return {
        "prompt": f"{stats.prompt_tokens} tokens",
        "new": f"{stats.new_tokens} tokens",
        "think iterations": _iterations(stats),
        "rounds": f"{stats.rounds} ({rounds})" if rounds else "0",
        "mean accepted length": f"{stats.mean_accepted_length:.2f} tokens per row and round, the model's own included",
        "speed": f"{stats.tokens_per_second:.1f} tokens per second of decoding",
        "speed-up": speedup if stats.drafted else "none: nothing was drafted",
        "prefill": f"{stats.prefill_seconds:.3f} s",
        "decode": f"{stats.decode_seconds:.3f} s",
        "warm-up": f"{stats.warm_up_seconds:.3f} s",
    }


def _iterations(stats: GenerationStats) -> str:
    if stats.think_iterations is None:
        return "of an explicit path"
    if not stats.think_histogram:
        return str(stats.think_iterations)
    counts = ", ".join(f"{depth}: {count}" for depth, count in sorted(stats.think_histogram.items()))
    readouts = f"; {stats.readouts} early readouts" if stats.readouts else ""
    mean = f"{stats.mean_think_iterations:.2f} on average, at most {stats.think_iterations}"
    return f"{mean} (tokens by iterations: {counts}{readouts})"
