"""Claim: the split search measures what it says and proposes what it documents.

Distances are compared with hand-made states and with the stream that hooks see in the unmodified Hugging Face model, the knees
with the corners of curves drawn on purpose. What the loop probe measures is tested in `test_loop_probe.py`.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny
from torch.nn import functional as F
from transformers import AutoTokenizer

from mull.data.corpus import load_stdlib
from mull.data.packing import pack_texts
from mull.evaluation.search.loop_probe import WindowCost, layers_per_batch
from mull.evaluation.search.split import (
    SplitReport,
    angular_distance,
    default_widths,
    find_knees,
    find_split,
    layer_distances,
    measured_positions,
)
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig
from mull.retrofit.wrap import from_pretrained, wrap_transformer_with_etd

QUIET: dict[str, Any] = {"progress": False, "precision": "fp32"}


def batch_of(ids: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids.clone(), **more}


def wrapped(family: str) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny(family), None)


def hooked_stream(model: Any, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Input of layer 0 and output of every layer, seen from outside while transformers runs its own model."""
    stream: list[torch.Tensor] = []
    hooks = [
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: stream.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    hooks += [layer.register_forward_hook(lambda _, __, out: stream.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return stream


@pytest.mark.parametrize(
    "case", [("same", 0.0), ("scaled", 0.0), ("reversed", 1.0), ("orthogonal", 0.5), ("sixty", 1 / 3)]
)
def test_distance_is_the_angle_in_units_of_pi(case: tuple[str, float]) -> None:
    name, expected = case
    before = torch.randn(2, 3, 8)
    before[..., -1] = 0
    aside = torch.zeros_like(before)
    aside[..., -1] = before.norm(dim=-1)  # orthogonal to `before`, as long
    after = {
        "same": before.clone(),
        "scaled": 7 * before,
        "reversed": -before,
        "orthogonal": aside,
        "sixty": 0.5 * before + 0.75**0.5 * aside,
    }[name]
    actual = angular_distance(before, after, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


def test_distance_ignores_what_the_mask_excludes_and_refuses_an_empty_mask() -> None:
    before = torch.randn(1, 4, 8)
    after = before.clone()
    after[:, 2:] = -before[:, 2:]
    assert angular_distance(before, after, torch.tensor([[True, True, False, False]])) == 0
    with pytest.raises(ValueError, match="No position to measure"):
        angular_distance(before, after, torch.zeros(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_measured_stream_is_that_of_the_hugging_face_model(
    family: str, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    expected = hooked_stream(model, input_ids=ids(2, 9))
    looped = wrap_transformer_with_etd(model, ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2))
    actual: list[torch.Tensor] = []

    def distance(before: torch.Tensor, after: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
        actual.extend([before, after])
        return torch.zeros(())

    monkeypatch.setattr("mull.evaluation.search.split.angular_distance", distance)
    layer_distances(looped, batch_of(ids(2, 9)))
    assert len(actual) == 16, "a configured recursion must be left out of the measurement"
    for number in range(8):
        assert torch.equal(actual[2 * number], expected[number])
        assert torch.equal(actual[2 * number + 1], expected[number + 1])


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_padding_does_not_move_the_distances(tokens: Any, ids: Any) -> None:
    model = wrapped("qwen3")
    expected = layer_distances(model, batch_of(ids(1, 6)), tokens)
    padded = torch.cat([ids(1, 6), torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 5])
    actual = layer_distances(model, batch_of(padded, attention_mask=mask), tokens)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_last_means_the_last_real_token_on_either_padding_side() -> None:
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.long)}
    batch["attention_mask"] = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    expected = F.one_hot(torch.tensor([1, 3, 3]), 4).bool()
    assert torch.equal(measured_positions(batch, "last"), expected)
    tokens = batch["attention_mask"].bool()
    batch["attention_mask"] = (tokens[:, None, :] & tokens[:, :, None]).tril()[:, None]
    assert torch.equal(measured_positions(batch, "last"), expected)


def test_distances_match_transformers_own_hidden_states() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    expected = [
        F.cosine_similarity(before.double(), after.double(), dim=-1).arccos().mean() / torch.pi
        for before, after in pairwise(states)
    ]
    actual = layer_distances(wrap_transformer_with_etd(model, None), batch_of(ids))[:-1]
    torch.testing.assert_close(actual.double(), torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("corners", [(3, 8, 12), (7, 10, 16), (2, 20, 28), (5, 33, 36)])
@pytest.mark.parametrize("heights", [(0.3, 0.2), (0.03, 0.6), (0.6, 0.03)])
def test_knees_are_the_corners_of_a_u(corners: tuple[int, int, int], heights: tuple[float, float]) -> None:
    first, last, n_layers = corners
    curve = []
    for layer in range(n_layers):
        front = heights[0] * max(first - layer, 0) / first
        back = heights[1] * max(layer - last, 0) / (n_layers - 1 - last)
        curve.append(0.05 + front + back - 1e-4 * layer)
    assert find_knees(curve) == (first, last)


def test_knees_survive_a_bump_and_unequal_ends() -> None:
    curve = [0.5, 0.12, 0.10, 0.13, 0.10, 0.09, 0.085, 0.08, 0.085, 0.08, 0.08, 0.2]
    first, last = find_knees(curve)
    assert first in (1, 2)
    assert last in (9, 10)


def test_an_end_without_a_decline_has_no_knee() -> None:
    assert find_knees([0.1] * 8) == (None, None)
    first, last = find_knees([0.5, 0.2, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04])
    assert first == 2
    assert last is None


def test_a_window_that_changes_nothing_costs_nothing(ids: Any) -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        for layer in model.model.layers[3:5]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    report = find_split(
        model, lambda index: batch_of(ids(2, 9, seed=index)), n_batches=2, n_probe_batches=1, probe_widths=[2], **QUIET
    )
    cost = {window.start: window.extra_loss for window in report.probe}
    assert cost[3] == 0
    assert all(extra != 0 for start, extra in cost.items() if start != 3)
    assert report.distances[3:5] == (0, 0)


def test_report_repeats_what_was_measured_and_survives_json(ids: Any) -> None:
    model = tiny("llama").train()

    def batches(index: int) -> dict[str, torch.Tensor]:
        return batch_of(ids(2, 9, seed=index))

    report = find_split(model, batches, n_batches=3, n_probe_batches=1, **QUIET)
    assert model.training
    looped = wrap_transformer_with_etd(model.eval(), None)
    rows = torch.stack([layer_distances(looped, batches(index)) for index in range(3)]).double()
    assert report.distances == pytest.approx(rows.mean(0).tolist(), abs=1e-6)
    assert report.standard_errors == pytest.approx((rows.var(0) / 3).sqrt().tolist(), abs=1e-6)
    assert (report.n_tokens, report.n_layers, report.etd.n_layers) == (54, 8, 8)
    assert SplitReport.model_validate_json(report.to_json()) == report


def curve_model(monkeypatch: pytest.MonkeyPatch, curve: list[float]) -> None:
    monkeypatch.setattr("mull.evaluation.search.split.layer_distances", lambda *_: torch.tensor(curve))


def test_knees_are_shown_and_do_not_decide(monkeypatch: pytest.MonkeyPatch, ids: Any) -> None:
    curve_model(monkeypatch, [0.5, 0.3, 0.1, 0.09, 0.08, 0.09, 0.25, 0.4])
    model = tiny("llama")
    report = find_split(model, lambda _: batch_of(ids(1, 6)), n_batches=1, n_probe_batches=0, **QUIET)
    assert (report.encoder_knee, report.decoder_knee) == (2, 5)
    assert (report.method, report.etd) == ("published", ETDConfig.for_model(model))
    assert "layers 2 to 5" in report.notes[-1]
    assert report.standard_errors is None
    curve_model(monkeypatch, [0.1] * 8)
    report = find_split(model, lambda _: batch_of(ids(1, 6)), n_batches=1, n_probe_batches=0, **QUIET)
    assert "no knee from the front and the back" in report.notes[-1]


def cost(start: int, width: int, extra_loss: float, dropped: bool = False) -> WindowCost:
    return WindowCost(
        start=start, stop=start + width, extra_loss=extra_loss, standard_error=0.01, n_rows=8, dropped=dropped
    )


@pytest.mark.parametrize(
    ("costs", "proposal"),
    [
        ([cost(3, 2, 0.01), cost(2, 3, 0.03), cost(3, 3, 0.02), cost(4, 3, 0.05)], (3, 3)),
        ([cost(3, 2, 0.02), cost(4, 2, 0.01), cost(3, 3, 0.1, dropped=True)], (4, 2)),
        ([cost(3, 2, -0.02), cost(1, 2, -0.03)], (1, 2)),
    ],
)
def test_the_widest_window_of_least_loss_that_was_not_dropped_decides(
    costs: list[WindowCost], proposal: tuple[int, int], monkeypatch: pytest.MonkeyPatch, ids: Any
) -> None:
    monkeypatch.setattr("mull.evaluation.search.split.loop_probe", lambda *_: (2.0, tuple(costs)))
    report = find_split(tiny("llama"), lambda _: batch_of(ids(1, 6)), n_batches=1, n_probe_batches=1, **QUIET)
    assert (report.etd.n_encoder_layers, report.etd.n_think_layers) == proposal
    assert (report.method, report.etd.n_layers) == ("probe", 8)
    assert "± 0.010 nats per token" in report.notes[0]


def test_default_widths_are_the_published_one_and_its_half_within_a_third() -> None:
    assert default_widths(30, 8) == [4, 8]
    assert default_widths(16, 4) == [2, 4]
    assert default_widths(32, 8, period=4) == [4, 8]
    assert default_widths(24, 12) == [6, 8], "12 exceeds a third"
    assert default_widths(8, 4, period=4) == [4], "a period stays whole"


def test_a_hybrid_keeps_its_attention_period_whole(ids: Any) -> None:
    report = find_split(
        tiny("qwen3_next-dense"), lambda _: batch_of(ids(1, 6)), n_batches=1, n_probe_batches=1, **QUIET
    )
    assert [(window.start, window.stop) for window in report.probe] == [(0, 4), (4, 8)]
    assert report.etd.n_encoder_layers % 4 == 0
    assert report.etd.n_think_layers == 4


def test_wider_blocks_are_for_who_asks(ids: Any) -> None:
    report = find_split(
        tiny("llama"), lambda _: batch_of(ids(1, 6)), n_batches=1, n_probe_batches=1, probe_widths=[5], **QUIET
    )
    assert {window.width for window in report.probe} == {5}
    assert report.etd.n_think_layers == 5


def test_bf16_is_autocast_and_a_model_keeps_another_dtype(ids: Any) -> None:
    def search(dtype: torch.dtype, precision: Any) -> SplitReport:
        model = tiny("llama", dtype=dtype)
        options = {"n_batches": 1, "n_probe_batches": 1, "precision": precision, "progress": False}
        return find_split(model, lambda _: batch_of(ids(4, 20)), **options)

    wide, narrow = search(torch.float32, "fp32"), search(torch.float32, "bf16")
    assert (wide.precision, narrow.precision) == ("float32", "bf16")
    differences = [abs(one.extra_loss - other.extra_loss) for one, other in zip(wide.probe, narrow.probe, strict=True)]
    assert 0 < max(differences) < 0.02
    assert search(torch.float32, "auto").precision in ("float32", "bf16")
    assert search(torch.bfloat16, "auto").precision == "bfloat16"


def test_progress_counts_every_layer_and_announces_the_passes(ids: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = find_split(
        tiny("llama"), lambda index: batch_of(ids(1, 6, seed=index)), n_batches=2, n_probe_batches=1, precision="fp32"
    )
    layers = 2 * 8 + layers_per_batch(8, [(window.start, window.stop) for window in report.probe])
    assert report.n_passes == layers / 8
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"split: at most {layers / 8:.0f} passes of 6 tokens in float32, about 00:")
    assert last == f"split: layer {layers} of {layers}, 00:00 left"


@pytest.mark.real
def test_a_real_model_gets_a_narrow_block_of_little_cost_before_its_late_layers(real_model: str) -> None:
    model = from_pretrained(real_model)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    texts = [document.text for document in load_stdlib().held_out]
    rows = list(pack_texts(texts, tokenizer, length=128).in_order(4))
    report = find_split(model, rows.__getitem__, n_batches=2, n_probe_batches=2, progress=False)
    proposed = next(window for window in report.probe if window.start == report.etd.n_encoder_layers)
    assert report.etd.n_think_layers <= report.n_layers // 3
    assert report.etd.n_encoder_layers + report.etd.n_think_layers <= 0.6 * report.n_layers
    assert 0 < proposed.extra_loss < 0.3


def test_errors_say_what_is_missing(ids: Any) -> None:
    with pytest.raises(ValueError, match="2 layers has no split"):
        find_split(tiny("llama", num_hidden_layers=2), lambda _: batch_of(ids(1, 6)), **QUIET)
    padding = batch_of(ids(1, 6), attention_mask=torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="No position to measure"):
        find_split(tiny("llama"), lambda _: padding, **QUIET)
    with pytest.raises(ValueError, match="padding throughout"):
        measured_positions(padding, "last")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_packed_documents_are_measured_as_if_apart(family: str, ids: Any) -> None:
    model = wrapped(family)
    first, second = ids(1, 6, seed=0), ids(1, 4, seed=1)
    expected = 0.6 * layer_distances(model, batch_of(first)) + 0.4 * layer_distances(model, batch_of(second))
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    actual = layer_distances(model, batch_of(torch.cat([first, second], dim=1), position_ids=positions))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
