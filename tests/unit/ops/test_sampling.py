"""Claim: warping is transformers', draws follow the given distribution, and a round's verdict is right in each single case.

That the emitted tokens have the target's joint distribution is shown in test_sampled_distribution.py.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny
from pydantic import ValidationError
from sampling_worlds import WARPERS, World, code, sampling_of, texts
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import GenerationConfig, LogitsProcessorList

from mull.ops import sampling as sampling_module
from mull.ops.sampling import Sampling, accept, accept_greedy, draw, penalize, seen_along, warp

BELOW_ONE = 1 - 2.0**-53

# --- Warping ----------------------------------------------------------------------------------------------------------------


def processors(sampling: Sampling) -> LogitsProcessorList:
    """What generate would use, in its order."""
    options = {name: value for name, value in sampling.model_dump().items() if value is not None}
    if "top_k" not in options:
        options["top_k"] = 0  # off; not given, it would be 50
    if sampling.greedy:
        options = {"repetition_penalty": sampling.repetition_penalty}
    config = GenerationConfig(do_sample=not sampling.greedy, **options)
    return tiny("llama", num_hidden_layers=1)._get_logits_processor(generation_config=config, input_ids_seq_length=8)


def logits_with(ties: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different sharpness, (6, 7, VOCAB)."""
    logits = torch.randn(6, 7, VOCAB, dtype=torch.float64) * torch.logspace(-1, 1, 7, dtype=torch.float64)[:, None]
    if ties == "few values":
        logits = logits.round()
    elif ties == "all equal":
        logits = logits * 0 + 1.5
    elif ties == "masked":
        logits[..., 10:60] = -torch.inf
    return logits.to(dtype)


def seen_in(tokens: Tensor) -> Tensor:
    return torch.zeros(tokens.shape[0], VOCAB, dtype=torch.bool).scatter(1, tokens, True)


@pytest.mark.parametrize("ties", ["none", "few values", "all equal", "masked"])
@pytest.mark.parametrize("name", WARPERS)
def test_warp_is_what_the_processors_of_transformers_make(name: str, ties: str) -> None:
    torch.manual_seed(0)
    sampling = sampling_of(name)
    logits, tokens = logits_with(ties), torch.randint(VOCAB, (42, 8))
    expected = processors(sampling)(tokens, logits.view(42, VOCAB).clone()).softmax(-1)
    actual = warp(logits, sampling, seen_in(tokens).view(6, 7, VOCAB) if sampling.needs_seen else None)
    expected = expected.view_as(actual)
    if ties in ("few values", "all equal") and "top_p" in WARPERS[name]:
        # Which of equal tokens are kept depends there on an unstable sort: any of them have these probabilities.
        actual, expected = actual.sort().values, expected.sort().values
    assert torch.equal(actual > 0, expected > 0), "another set of tokens is kept"
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_of_tokens_that_tie_at_the_edge_of_top_p_the_first_are_kept() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0, 1.0]).double()  # e times as likely: 0.05, 0.13 four times, 0.42
    for top_k, top_p, kept in [
        (None, 0.5, [1, 3]),
        (None, 0.7, [1, 2, 3, 4]),
        (3, 0.5, [1, 3]),
        (2, 0.75, [1, 2, 3, 4]),
    ]:
        distribution = warp(logits, Sampling(temperature=1, top_k=top_k, top_p=top_p))
        assert distribution.nonzero().flatten().tolist() == kept
    assert warp(torch.zeros(100), Sampling(temperature=1, top_p=1e-6)).argmax() == torch.zeros(100).argmax()


def test_a_penalty_acts_on_greedy_decoding_as_in_transformers() -> None:
    torch.manual_seed(0)
    sampling = Sampling(repetition_penalty=1.5)
    logits, tokens = logits_with("none").view(42, VOCAB), torch.randint(VOCAB, (42, 60))
    expected = processors(sampling)(tokens, logits.clone())
    actual = penalize(logits, sampling, seen_in(tokens))
    assert torch.equal(actual, expected)
    assert not torch.equal(actual.argmax(-1), logits.argmax(-1))
    assert torch.equal(warp(logits, sampling, seen_in(tokens)).argmax(-1), expected.argmax(-1))


def test_a_penalty_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits, seen = torch.tensor([3.015625, -3.015625], dtype=torch.bfloat16), torch.tensor([True, True])
    sampling = Sampling(repetition_penalty=1.1)
    expected = torch.tensor([3.015625 / 1.1, -3.015625 * 1.1])
    torch.testing.assert_close(penalize(logits, sampling, seen), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_distributions_are_fp32_or_fp64(name: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = logits_with("none", dtype)
    distribution = warp(logits, sampling_of(name), torch.zeros(logits.shape, dtype=torch.bool))
    assert distribution.dtype == expected
    exact = warp(logits.double(), sampling_of(name), torch.zeros(logits.shape, dtype=torch.bool))
    torch.testing.assert_close(distribution.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_low_temperature_is_greedy() -> None:
    torch.manual_seed(0)
    logits = logits_with("none", torch.float64)
    cold, greedy = (warp(logits, Sampling(temperature=temperature)) for temperature in (1e-6, 0.0))
    assert torch.equal(cold, greedy)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"typical_p": 0.9},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**options)


def test_a_temperature_too_small_to_divide_by_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"temperature=1e-09 is too small .* use 0 for greedy decoding"):
        Sampling(temperature=1e-9)


def test_a_warper_that_greedy_decoding_would_ignore_is_refused() -> None:
    with pytest.raises(ValidationError, match="top_k and min_p would have no effect: temperature=0 is greedy"):
        Sampling(top_k=20, min_p=0.1)


# --- Drawing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1 / 64, 5e-324 * 2**40, 1e300], ids=["weights", "distribution", "tiny", "huge"])
def test_draws_on_a_grid_count_the_distribution_exactly(scale: float) -> None:
    weights = torch.tensor([0, 3, 0, 0, 17, 1, 40, 3, 0], dtype=torch.float64)
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    drawn = draw((weights * scale).expand(64, -1), grid)
    assert drawn.bincount(minlength=9).tolist() == weights.tolist()


def test_a_draw_steps_exactly_where_the_cumulative_distribution_does() -> None:
    weights = torch.tensor([4.0, 0.0, 8.0, 4.0])
    u = torch.tensor([0.0, 0.25 - 2**-54, 0.25, 0.75 - 2**-53, 0.75, BELOW_ONE], dtype=torch.float64)
    assert draw(weights.expand(6, -1), u).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_large_distribution_of_fp32_is_summed_in_fp64() -> None:
    torch.manual_seed(0)
    distribution, u = torch.rand(100_000), torch.rand(300, dtype=torch.float64)
    cumulative = distribution.double().numpy().cumsum()
    expected = cumulative.searchsorted(u.numpy() * cumulative[-1], side="right")
    assert draw(distribution.expand(300, -1), u).tolist() == expected.tolist()


@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, BELOW_ONE, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(dtype: torch.dtype, u: float) -> None:
    torch.manual_seed(0)
    distributions = torch.rand(200, 3001, dtype=dtype) * (torch.rand(200, 3001) < torch.logspace(-3, 0, 200)[:, None])
    distributions[:, 1500] = 1e-3
    distributions = distributions / distributions.sum(-1, keepdim=True)
    drawn = draw(distributions, torch.full((200,), u, dtype=torch.float64))
    assert (distributions.gather(-1, drawn[:, None]) > 0).all()


def test_a_prefix_sum_that_is_not_monotone_draws_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel sums on a GPU may step up where nothing is added."""
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim, dtype: cumsum(p, dim, dtype=dtype) + 1e-16 * (p == 0))
    distribution = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    assert draw(distribution.expand(4, -1), torch.tensor([0.0, 0.25, BELOW_ONE, 1.0]).double()).tolist() == [1, 3, 3, 3]


# --- Single verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-24, BELOW_ONE, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_equal_distributions_accept_every_draft(name: str, dtype: torch.dtype, u: float) -> None:
    torch.manual_seed(0)
    logits, seen = torch.randn(50, 4, 2000, dtype=dtype) * 5, torch.rand(50, 4, 2000) < 0.3
    p = warp(logits, sampling_of(name), seen)
    drafts = draw(p[:, :-1], torch.rand(50, 3, dtype=torch.float64))
    verdict = accept(p, p[:, :-1].clone(), drafts, torch.full((50, 4), u, dtype=torch.float64))
    assert verdict.n_accepted.tolist() == [3] * 50
    assert torch.equal(verdict.next_token, draw(p[:, -1], torch.full((50,), u, dtype=torch.float64)))


def test_a_rejection_without_residual_draws_from_the_target() -> None:
    """Rounding can make p smaller than q everywhere; there is no mass left to draw from."""
    q = torch.tensor([[[0.5, 0.5, 0, 0, 0]]])
    p = torch.cat([q * (1 - 1e-6), torch.tensor([[[0, 0, 0, 0, 1.0]]])], 1)
    verdict = accept(p, q, torch.tensor([[1]]), torch.tensor([[BELOW_ONE, 0.9]], dtype=torch.float64))
    assert (verdict.n_accepted.item(), verdict.next_token.item()) == (0, 1)


@pytest.mark.parametrize("u", [0.0, 0.5, BELOW_ONE])
@pytest.mark.parametrize("chosen", [False, True], ids=["drawn", "chosen"])
def test_a_draft_that_the_target_rules_out_is_never_accepted(chosen: bool, u: float) -> None:
    p = torch.tensor([[[0.3, 0.7, 0, 0, 0], [0.2] * 5]])
    q = torch.tensor([[[0, 0, 0, 1.0, 0]]])
    uniform = torch.tensor([[u, u]], dtype=torch.float64)
    verdict = accept(p, None if chosen else q, torch.tensor([[3]]), uniform)
    assert verdict.n_accepted.item() == 0
    assert verdict.next_token.item() in (0, 1)


def test_rows_meet_their_own_fates() -> None:
    """Row r rejects draft r, row 3 none. The target is certain of token j after draft j, the drafts are certain of token 4."""
    p = torch.eye(5)[:4].expand(4, 4, 5).clone()
    for row in range(4):
        p[row, :row] = torch.eye(5)[4]  # agrees with the drafts before
    q = torch.eye(5)[4].expand(4, 3, 5)
    uniform = torch.full((4, 4), 0.5, dtype=torch.float64)
    for proposed in (q, None):
        verdict = accept(p, proposed, torch.full((4, 3), 4), uniform)
        assert verdict.n_accepted.tolist() == [0, 1, 2, 3]
        assert verdict.next_token.tolist() == [0, 1, 2, 3]


def test_a_rows_verdict_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(40, 4, 50).softmax(-1), torch.randn(40, 3, 50).softmax(-1)
    drafts, uniform = torch.randint(50, (40, 3)), torch.rand(40, 4, dtype=torch.float64)
    together = accept(p, q, drafts, uniform)
    assert set(together.n_accepted.tolist()) == {0, 1, 2, 3}
    alone = [accept(p[[r]], q[[r]], drafts[[r]], uniform[[r]]) for r in range(40)]
    assert torch.equal(together.n_accepted, torch.cat([verdict.n_accepted for verdict in alone]))
    assert torch.equal(together.next_token, torch.cat([verdict.next_token for verdict in alone]))


@pytest.mark.parametrize("n_drafts", range(4))
def test_greedy_acceptance_takes_the_tokens_that_one_by_one_decoding_takes(n_drafts: int) -> None:
    world = World.random()
    drafts = texts(n_drafts)
    so_far = [drafts[:, :j] for j in range(n_drafts + 1)]
    logits = torch.stack([world.target[j][code(text)] for j, text in enumerate(so_far)], 1)
    verdict = accept_greedy(logits, drafts)
    best = torch.zeros(1, 0, dtype=torch.long)
    for length in range(n_drafts + 1):
        best = torch.cat([best, world.target[length][code(best)].argmax(-1, keepdim=True)], 1)
    for row, n_accepted, token in zip(drafts.tolist(), *(x.tolist() for x in verdict), strict=True):
        agreeing = [a == b for a, b in zip(row, best[0].tolist(), strict=False)]
        assert n_accepted == len(list(itertools.takewhile(bool, agreeing)))
        assert token == logits[drafts.tolist().index(row), n_accepted].argmax()
    sampled = accept(warp(logits, Sampling()), None, drafts, torch.full((len(drafts), n_drafts + 1), 0.7).double())
    assert torch.equal(sampled.n_accepted, verdict.n_accepted)
    assert torch.equal(sampled.next_token, verdict.next_token)


# --- What has been seen -----------------------------------------------------------------------------------------------------


def test_each_position_has_seen_the_text_and_the_drafts_before_it() -> None:
    seen = torch.tensor([[True, False, False, False, False], [False, False, False, False, True]])
    before = seen.clone()
    along = seen_along(seen, torch.tensor([[2, 2, 3], [4, 1, 0]]))
    sets = [[set(row.nonzero().flatten().tolist()) for row in rows] for rows in along]
    assert sets == [[{0}, {0, 2}, {0, 2}, {0, 2, 3}], [{4}, {4}, {1, 4}, {0, 1, 4}]]
    assert torch.equal(seen, before)
    assert torch.equal(seen_along(seen, torch.zeros(2, 0, dtype=torch.long)), seen[:, None])


# --- One graph --------------------------------------------------------------------------------------------------------------


def round_of(module: Any) -> Callable[..., Any]:
    """What a round calls, as a function of tensors."""
    sampling = module.Sampling(temperature=0.8, top_k=4, top_p=0.95, min_p=0.1, repetition_penalty=1.3)

    def decode(logits: Tensor, head: Tensor, seen: Tensor, drafts: Tensor, uniform: Tensor) -> Any:
        along = module.seen_along(seen, drafts)
        p, q = module.warp(logits, sampling, along), module.warp(head, sampling, along[:, :-1])
        greedy = module.accept_greedy(module.penalize(logits, sampling, along), drafts)
        return greedy, [module.accept(p, proposed, drafts, uniform) for proposed in (q, None)]

    return decode


def tensors_of_a_round() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    logits, head, seen = torch.randn(8, 4, 20), torch.randn(8, 3, 20), torch.rand(8, 20) < 0.3
    return logits, head, seen, torch.randint(20, (8, 3)), torch.rand(8, 4, dtype=torch.float64)


def test_no_step_of_a_round_looks_at_a_value() -> None:
    """Tensors of the meta device have none: whatever would wait for the device fails there."""
    round_of(sampling_module)(*(tensor.to("meta") for tensor in tensors_of_a_round()))


@pytest.fixture(name="unchecked")
def _unchecked() -> Iterator[ModuleType]:
    """The module without the checks of annotations, which cannot be compiled."""
    spec = importlib.util.spec_from_file_location("unchecked_sampling", str(sampling_module.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_round_compiles_to_one_graph(unchecked: Any) -> None:
    decode, given = round_of(unchecked), tensors_of_a_round()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")(*given)
    pytree.tree_map(torch.testing.assert_close, compiled, decode(*given))
