"""Claim: emitted tokens have the target's joint distribution, whatever the distribution of the drafts is.

The distribution of speculative sampling is computed, not estimated: drafts are enumerated, and the uniform numbers are integrated
out of the real `accept` by locating, with bisection, where its decisions flip. A simulation repeats it with drawn numbers. Both
are shown broken rounds, which they must refuse.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from sampling_worlds import WARPERS, V, World, code, crossed, sampling_of, texts
from torch import Tensor

from mull.ops.sampling import Verdict, accept, draw, seen_along, warp

Decide = Callable[[Tensor], Verdict]
"""Uniform numbers (rows, K + 1) to what the rows emit."""

Round = Callable[[World, Tensor, Tensor], Decide]
"""World, texts so far and drafts to the decision."""


def logits_of_a_round(world: World, table: list[Tensor], text: Tensor, drafts: Tensor) -> Tensor:
    """Logits after each text and the first 0 to K drafts, (rows, K + 1, V)."""
    so_far = [torch.cat([text, drafts[:, :j]], 1) for j in range(drafts.shape[1] + 1)]
    return torch.stack([table[longer.shape[1]][code(longer)] for longer in so_far], 1)


def distributions_of_a_round(
    world: World, text: Tensor, drafts: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distributions of target and head at every position of a round, as a decoder computes them."""
    seen = seen_along(world.seen(text), drafts) if seen is None else seen
    p, q = (
        warp(logits_of_a_round(world, table, text, drafts), world.sampling, seen)
        for table in (world.target, world.head)
    )
    return p, q[:, :-1]


def exact(world: World, text: Tensor, drafts: Tensor) -> Decide:
    p, q = distributions_of_a_round(world, text, drafts)
    return lambda uniform: accept(p, None if world.deterministic else q, drafts, uniform)


# --- The exact distribution -------------------------------------------------------------------------------------------------


def last_true(holds: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """Supremum of the u in [0, 1] at which a condition holds that holds up to some u."""
    low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    for _ in range(45):
        middle = (low + high) / 2
        true = holds(middle)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)
    return torch.where(high < 1, (low + high) / 2, 1.0)


def verdict_distribution(decide: Decide, rows: int, n_drafts: int) -> Tensor:
    """P(n_accepted, next_token) given the drafts, integrated over all uniform numbers, (rows, K + 1, V)."""
    distribution = torch.zeros(rows, n_drafts + 1, V, dtype=torch.float64)
    reached = torch.ones(rows, dtype=torch.float64)  # probability that all earlier drafts are accepted
    for j in range(n_drafts + 1):
        uniform = torch.full((rows, n_drafts + 1), 0.3, dtype=torch.float64)
        uniform[:, :j] = 0.0  # accepts wherever it can

        def verdict(column: int, u: Tensor, uniform: Tensor = uniform) -> Verdict:
            uniform[:, column] = u
            return decide(uniform)

        accepted = torch.zeros(rows, dtype=torch.float64)
        if j < n_drafts:
            accepted = last_true(lambda u, j=j: verdict(j, u).n_accepted > j, rows)
            uniform[:, j] = 1.0  # rejects wherever it can
        cumulative = [last_true(lambda u, v=v: verdict(-1, u).next_token <= v, rows) for v in range(V)]
        distribution[:, j] = torch.stack(cumulative, -1).diff(dim=-1, prepend=torch.zeros(rows, 1, dtype=torch.float64))
        distribution[:, j] *= (reached * (1 - accepted))[:, None]
        reached = reached * accepted
    return distribution


def speculative_joint(run: Round, world: World, n_drafts: int, n_tokens: int) -> Tensor:
    """The distribution of the first `n_tokens` emitted, over as many rounds as they take, (V ** n_tokens,)."""
    begins = [torch.zeros(V**length, dtype=torch.float64) for length in range(n_tokens + 1)]
    begins[0] += 1  # by length: probability that a round begins after each text
    for length in range(n_tokens):
        start, drafts = texts(length), texts(n_drafts)
        drafted = begins[length][:, None] * world.joint(world.draft_distribution, start, n_drafts)
        both = crossed(start, drafts)
        both, drafted = both[drafted.flatten() > 0], drafted[drafted > 0]
        decide = run(world, both[:, :length], both[:, length:])
        distribution = verdict_distribution(decide, len(both), n_drafts) * drafted[:, None, None]
        for j, token in itertools.product(range(n_drafts + 1), range(V)):
            emitted = torch.cat([both[:, : length + j], torch.full((len(both), 1), token)], 1)[:, :n_tokens]
            begins[emitted.shape[1]].index_add_(0, code(emitted), distribution[:, j, token])
    return begins[n_tokens]


def deviation(run: Round, world: World, n_drafts: int, n_tokens: int) -> float:
    """Largest difference between the two joint distributions."""
    expected = world.joint(world.target_distribution, texts(0), n_tokens)[0]
    return float((speculative_joint(run, world, n_drafts, n_tokens) - expected).abs().max())


@pytest.mark.parametrize(("n_drafts", "n_tokens"), [(0, 2), (1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["drawn", "argmax"])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.latin(8, "name", "deterministic", "n_drafts")
def test_the_joint_distribution_of_emitted_tokens_is_the_targets(
    name: str, deterministic: bool, n_drafts: int, n_tokens: int
) -> None:
    world = World.random(sampling=sampling_of(name), deterministic=deterministic)
    assert deviation(exact, world, n_drafts, n_tokens) < 1e-12


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.latin(6, "name")
def test_every_warper_keeps_the_distribution(name: str) -> None:
    assert deviation(exact, World.random(sampling=sampling_of(name)), 2, 2) < 1e-12


P = [0.1, 0.3, 0.05, 0.35, 0.2]
ADVERSARIES: dict[str, tuple[list[float], list[float]]] = {
    "equal": (P, P),
    "near": (P, [0.1 + 1e-9, 0.3 - 1e-9, 0.05, 0.35, 0.2]),
    "uniform": (P, [0.2] * 5),
    "certain and wrong": (P, [0, 0, 1, 0, 0]),
    "zeros where the target has mass": (P, [0, 0.5, 0.5, 0, 0]),
    "disjoint": ([0.3, 0.7, 0, 0, 0], [0, 0, 0.2, 0.2, 0.6]),
    "target certain": ([0, 0, 0, 1, 0], [0.2, 0.2, 0.2, 0.2, 0.2]),
    "both certain and equal": ([0, 0, 0, 1, 0], [0, 0, 0, 1, 0]),
    "both certain and different": ([0, 0, 0, 1, 0], [1, 0, 0, 0, 0]),
    "tiny": ([1e-12, 1 - 1e-12, 0, 0, 0], [1 - 1e-12, 1e-12, 0, 0, 0]),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["drawn", "argmax"])
@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.latin(6, "name", "deterministic")
def test_no_distribution_of_the_drafts_changes_the_targets(name: str, deterministic: bool) -> None:
    world = World.constant(*ADVERSARIES[name], deterministic=deterministic)
    assert deviation(exact, world, 2, 2) < 1e-12


def test_a_head_that_prefers_what_the_target_avoids_changes_no_distribution() -> None:
    assert deviation(exact, World.random(opposed=True), 2, 3) < 1e-12


def test_taking_drawn_drafts_for_chosen_ones_costs_acceptance_only() -> None:
    def without_draft_distribution(world: World, text: Tensor, drafts: Tensor) -> Decide:
        p, _ = distributions_of_a_round(world, text, drafts)
        return lambda uniform: accept(p, None, drafts, uniform)

    assert deviation(without_draft_distribution, World.random(sampling=sampling_of("all")), 2, 2) < 1e-12


# --- Broken rounds, which the checks must refuse ----------------------------------------------------------------------------


def without_residual(world: World, text: Tensor, drafts: Tensor) -> Decide:
    p, q = distributions_of_a_round(world, text, drafts)

    def decide(uniform: Tensor) -> Verdict:
        n_accepted = accept(p, q, drafts, uniform).n_accepted
        return Verdict(n_accepted, draw(p[torch.arange(len(p)), n_accepted], uniform[:, -1]))

    return decide


def with_unwarped_draft_distribution(world: World, text: Tensor, drafts: Tensor) -> Decide:
    p, _ = distributions_of_a_round(world, text, drafts)
    _, q = distributions_of_a_round(World(world.target, world.head), text, drafts)
    return lambda uniform: accept(p, q, drafts, uniform)


def with_another_bonus_row(world: World, text: Tensor, drafts: Tensor) -> Decide:
    p, q = distributions_of_a_round(world, text, drafts)
    return lambda uniform: accept(torch.cat([p[:, :-1], p[:, -2:-1]], 1), q, drafts, uniform)


def with_drafts_seen_one_position_late(world: World, text: Tensor, drafts: Tensor) -> Decide:
    seen = seen_along(world.seen(text), drafts)
    p, _ = distributions_of_a_round(world, text, drafts, torch.cat([seen[:, :1], seen[:, :-1]], 1))
    _, q = distributions_of_a_round(world, text, drafts)
    return lambda uniform: accept(p, q, drafts, uniform)


BROKEN = {
    "no residual": without_residual,
    "a draft distribution that is not warped": with_unwarped_draft_distribution,
    "another bonus row": with_another_bonus_row,
    "drafts seen one position late": with_drafts_seen_one_position_late,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.latin(2)
def test_the_exact_check_refuses_a_round_with(name: str) -> None:
    assert deviation(BROKEN[name], World.random(sampling=sampling_of("all")), 1, 2) > 1e-3


# --- The same by simulation -------------------------------------------------------------------------------------------------

N_TEXTS, N_TOKENS, N_PLAIN = 20_000, 3, 20


def simulate(run: Round, world: World, n_drafts: int, seed: int) -> Tensor:
    """Frequencies of texts decoded in rounds with drawn numbers; rows advance at their own pace, (V ** N_TOKENS,)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(V**N_TOKENS, dtype=torch.float64)
    waiting: dict[int, Tensor] = {0: torch.zeros(N_TEXTS, 0, dtype=torch.long)}
    for length in range(N_TOKENS):
        start = waiting.pop(length, None)
        if start is None:
            continue
        u = torch.rand(len(start), 2 * n_drafts + 1, generator=generator, dtype=torch.float64)
        text = start
        for j in range(n_drafts):
            text = torch.cat([text, draw(world.draft_distribution(text), u[:, j])[:, None]], 1)
        verdict = run(world, start, text[:, length:])(u[:, n_drafts:])
        for j in range(n_drafts + 1):
            mine = verdict.n_accepted == j
            emitted = torch.cat([text[mine, : length + j], verdict.next_token[mine, None]], 1)[:, :N_TOKENS]
            if emitted.shape[1] == N_TOKENS:
                counts += code(emitted).bincount(minlength=V**N_TOKENS)
            else:
                waiting[emitted.shape[1]] = torch.cat([waiting.get(emitted.shape[1], emitted[:0]), emitted])
    assert counts.sum() == N_TEXTS
    return counts / N_TEXTS


def total_variation(frequencies: Tensor, distribution: Tensor) -> float:
    return float((frequencies - distribution).abs().sum() / 2)


def bound_of_plain_sampling(distribution: Tensor) -> float:
    """Mean and three standard deviations of the total variation of as many texts drawn from the distribution itself."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.stack(
        [
            distribution.multinomial(N_TEXTS, replacement=True, generator=generator).bincount(
                minlength=len(distribution)
            )
            / N_TEXTS
            for _ in range(N_PLAIN)
        ]
    )
    variations = torch.tensor([total_variation(row, distribution) for row in plain])
    return float(variations.mean() + 3 * variations.std())


@pytest.mark.parametrize(("n_drafts", "name"), [(1, "plain"), (3, "plain"), (2, "all"), (3, "all")])
def test_simulated_texts_are_as_close_to_the_distribution_as_plain_samples(name: str, n_drafts: int) -> None:
    world = World.random(sampling=sampling_of(name))
    distribution = world.joint(world.target_distribution, texts(0), N_TOKENS)[0]
    assert total_variation(simulate(exact, world, n_drafts, seed=0), distribution) < bound_of_plain_sampling(
        distribution
    )


@pytest.mark.parametrize("name", BROKEN)
def test_the_simulation_refuses_a_round_with(name: str) -> None:
    world = World.random(sampling=sampling_of("all"))
    distribution = world.joint(world.target_distribution, texts(0), N_TOKENS)[0]
    assert total_variation(simulate(BROKEN[name], world, 2, seed=0), distribution) > bound_of_plain_sampling(
        distribution
    )
