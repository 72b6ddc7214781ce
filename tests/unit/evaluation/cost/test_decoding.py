"""Claim: what decoding must cost follows from the bytes it reads and the FLOPs it computes, as counted by hand."""

import math
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SPLIT, tiny
from torch import nn

from mull.evaluation.cost.count import Machine, measure_machine
from mull.evaluation.cost.decoding import draft_seconds, expected_tokens, predicted_speedup, step_seconds
from mull.evaluation.cost.training import flops_per_token
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, MTPConfig
from mull.model.path import from_layers
from mull.retrofit.wrap import wrap_transformer_with_etd

READS = Machine(flops=math.inf, bandwidth=1.0)
"""Only bytes take time, a second each."""

COMPUTES = Machine(flops=1.0, bandwidth=math.inf)
"""Only FLOPs take time, a second each."""

WIDTH, VOCAB = 32, 97
ATTENTION = (4 * 16 + 2 * 2 * 16 + 4 * 16) * WIDTH
"""Entries of the query, key, value and output maps: 4 heads and 2 of keys and values, 16 wide."""

LAYER = ATTENTION + 3 * WIDTH * 48
UNEMBEDDING = VOCAB * WIDTH
KEYS_AND_VALUES = 2 * 2 * 16
"""Entries of a token's key and value in a layer."""

HEAD_TYPES = ["transformer", "mlp", "shared_lm_head", "sequential", "native"]


def model(family: str = "qwen3", etd: ETDConfig | None = None, mtp: MTPConfig | None = None, **changes: Any) -> Any:
    return wrap_transformer_with_etd(tiny(family, **changes), etd, mtp)


def with_heads(kind: Any, n_heads: int = 3, **options: Any) -> Any:
    return model(mtp=MTPConfig(mtp_head_type=kind, num_predict_tokens=n_heads, **options))


def test_a_step_reads_every_matrix_and_the_keys_and_values_once() -> None:
    assert step_seconds(model(), READS, context=0) == 4 * (8 * LAYER + UNEMBEDDING)
    assert step_seconds(model(), READS, context=10) == 4 * (8 * (LAYER + 10 * KEYS_AND_VALUES) + UNEMBEDDING)


def test_the_dtype_decides_how_much_is_read() -> None:
    half = model().to(torch.bfloat16)
    assert step_seconds(half, READS, context=10) == step_seconds(model(), READS, context=10) / 2


def test_further_tokens_read_no_more_and_further_rows_only_their_own_keys() -> None:
    one = step_seconds(model(), READS, context=10)
    assert step_seconds(model(), READS, context=10, n_tokens=4) == one
    assert step_seconds(model(), READS, context=10, n_rows=3) == one + 2 * 4 * 8 * 10 * KEYS_AND_VALUES


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if "next" not in name and "_5" not in name and "hyb" not in name]
)
def test_a_step_computes_what_the_estimate_of_training_counts(family: str) -> None:
    looped = model(family, SPLIT)
    expected = flops_per_token(looped, 12, n_heads=0)
    assert step_seconds(looped, COMPUTES, context=12) == expected
    assert step_seconds(looped, COMPUTES, context=12, n_rows=2, n_tokens=3) == 6 * expected


def test_every_visit_of_a_path_counts() -> None:
    visits = from_layers([0, 1, 1, 2])
    assert step_seconds(model(), READS, context=0, path=visits) == 4 * (4 * LAYER + UNEMBEDDING)


def test_a_product_takes_the_longer_of_reading_and_computing() -> None:
    machine = Machine(flops=8.0, bandwidth=8.0)  # per entry: 4 bytes take 1/2 s, n tokens take n/4 s
    entries = 8 * LAYER + UNEMBEDDING
    seconds = [step_seconds(model(), machine, context=0, n_tokens=n) for n in (1, 2, 3, 4)]
    assert seconds == [entries / 2, entries / 2, entries * 3 / 4, entries]


def test_a_window_bounds_the_keys_that_are_read() -> None:
    windowed = model("olmo3")  # windows of 6 in three layers of four
    assert (
        step_seconds(windowed, READS, context=10) - step_seconds(windowed, READS, context=9) == 4 * 2 * KEYS_AND_VALUES
    )


def test_a_delta_rule_reads_and_writes_its_state_whatever_the_context() -> None:
    hybrid = model("qwen3_next-dense")  # six of eight layers, four states of 8 x 8 each
    state = 4 * 8 * 8
    rows = [step_seconds(hybrid, READS, context=0, n_rows=n) for n in (1, 2)]
    assert rows[1] - rows[0] == 6 * 2 * state * 4
    longer = [step_seconds(hybrid, READS, context=n) for n in (10, 11)]
    assert longer[1] - longer[0] == 4 * 2 * KEYS_AND_VALUES


def test_routed_experts_are_read_as_far_as_the_tokens_choose_them() -> None:
    routed = model("qwen3_next-moe")  # four experts, two chosen, each 3 x 32 x 16
    experts = 8 * 4 * 3 * WIDTH * 16
    one, two, many = (step_seconds(routed, READS, context=0, n_tokens=n) for n in (1, 2, 100))
    assert two - one == pytest.approx(4 * experts * (0.75 - 0.5))
    assert many - one == pytest.approx(4 * experts * (1 - 0.5))
    pair = [step_seconds(routed, COMPUTES, context=0, n_tokens=n) for n in (1, 2)]
    assert pair[1] == 2 * pair[0]


BLOCK = LAYER + 10 * KEYS_AND_VALUES
MODULE = BLOCK + 2 * WIDTH * WIDTH


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("mlp", {}, 3 * WIDTH * WIDTH + UNEMBEDDING),
        ("shared_lm_head", {}, 3 * WIDTH * WIDTH + UNEMBEDDING),
        ("transformer", {}, 3 * BLOCK + UNEMBEDDING),
        ("sequential", {}, 3 * (MODULE + UNEMBEDDING)),
        ("sequential", {"share_weights_across_steps": True}, 3 * (MODULE + UNEMBEDDING)),
        ("native", {}, 3 * (MODULE + UNEMBEDDING)),
    ],
)
def test_each_type_of_head_reads_its_weights_and_the_unembedding(kind: str, options: Any, expected: int) -> None:
    heads = with_heads(kind, **options)
    assert draft_seconds(heads, READS, length=3, context=10) == 4 * expected
    assert draft_seconds(heads, READS, length=0, context=10) == 0


@pytest.mark.parametrize(
    ("kind", "options", "n_positions"),
    [("transformer", {}, 3 * 5), ("sequential", {}, 3 * 5), ("native", {}, 5 + 2)],
)
def test_heads_with_a_cache_compute_over_a_window(kind: str, options: Any, n_positions: int) -> None:
    heads = with_heads(kind, **options)
    module = LAYER + (0 if kind == "transformer" else 2 * WIDTH * WIDTH)
    attention = 4 * 10 * 4 * 16
    expected = n_positions * (2 * module + attention) + 3 * 2 * UNEMBEDDING
    assert draft_seconds(heads, COMPUTES, length=3, context=10, window=5) == expected


def test_a_recursive_head_drafts_more_tokens_than_it_was_trained_for_and_others_do_not() -> None:
    assert draft_seconds(with_heads("native", 1), READS, length=4, context=10) == 4 * 4 * (MODULE + UNEMBEDDING)
    with pytest.raises(ValueError, match="length=4 must not exceed the model's 3 heads"):
        draft_seconds(with_heads("mlp"), READS, length=4, context=10)
    with pytest.raises(ValueError, match="no heads to draft with"):
        draft_seconds(model(), READS, length=1, context=10)


def test_expected_tokens_is_the_sum_of_the_chances_to_get_that_far() -> None:
    assert expected_tokens([0.8, 0.5, 0.25], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.1)
    assert expected_tokens([0.8, 0.5, 0.25], 1) == 1.8
    assert expected_tokens([], 0) == 1
    assert expected_tokens([0.7] * 4, 4) == pytest.approx((1 - 0.7**5) / 0.3)
    with pytest.raises(ValueError, match="length=2 needs the acceptance of as many positions, but 1 are given"):
        expected_tokens([0.5], 2)


def test_the_speedup_is_tokens_times_the_step_over_the_round() -> None:
    heads = with_heads("native")
    step, draft = 4 * (8 * BLOCK + UNEMBEDDING), 4 * 2 * (MODULE + UNEMBEDDING)
    expected = (1 + 0.8 + 0.4) * step / (step + draft)
    assert predicted_speedup(heads, READS, [0.8, 0.5, 0.25], length=2, context=10) == pytest.approx(expected)
    assert predicted_speedup(heads, READS, [0.8], length=0, context=10) == 1
    compute_bound = predicted_speedup(heads, COMPUTES, [1.0, 1.0], length=2, context=10)
    assert compute_bound < 1, "three tokens cost three steps, and the drafts come on top"


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_weights_on_the_meta_device_will_do(kind: str) -> None:
    real = with_heads(kind)
    expected = predicted_speedup(real, READS, [0.5] * 3, length=3, context=10)
    assert predicted_speedup(real.to("meta"), READS, [0.5] * 3, length=3, context=10) == expected


def test_the_measured_machine_is_one_that_could_exist() -> None:
    machine = measure_machine("cpu", torch.float32, streamed_bytes=2**24)
    assert 1e9 < machine.flops < 1e13
    assert 1e8 < machine.bandwidth < 1e12


def test_a_machine_reads_and_computes_at_once() -> None:
    assert Machine(flops=2.0, bandwidth=4.0).seconds(n_bytes=8, n_flops=2) == 2
    assert Machine(flops=2.0, bandwidth=4.0).seconds(n_bytes=8, n_flops=6) == 3


def test_the_bias_of_a_layer_is_not_a_matrix() -> None:
    plain: MullForCausalLM = model()
    before = step_seconds(plain, READS, context=0)
    plain.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    assert step_seconds(plain, READS, context=0) == before
