"""Claim: a calibrated threshold gives the mean depth or the loss that was asked for, and the curve is what the model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny

import mull
from mull import ETDConfig, HaltingConfig, wrap_transformer_with_etd
from mull.data.packing import PackedDataset, pack_tokens
from mull.evaluation.search.calibration import SCALES, calibrate

ITERATIONS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    etd = ETDConfig(
        **SPLIT.model_dump() | {"max_think_iterations": ITERATIONS, "halting": HaltingConfig(rule="learned")}
    )
    model = wrap_transformer_with_etd(tiny("qwen3"), etd).eval()
    torch.nn.init.normal_(model.model.exit_head.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def rows() -> PackedDataset:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 90, (30,), generator=generator).tolist() for _ in range(12)]
    return pack_tokens(documents, length=20, pad_id=0)


@pytest.mark.parametrize("rule", ["state", "kl", "learned"])
@pytest.mark.latin(3, "rule")
def test_the_mean_depth_is_the_one_that_was_asked_for(model: Any, rows: PackedDataset, rule: str) -> None:
    found = calibrate(model, rows, rule=rule, target_iterations=2.0, batch_size=18)
    # 360 tokens, many with nearly equal scores: a threshold moves several of them at once.
    assert found.chosen.iterations == pytest.approx(2.0, abs=0.2)
    assert found.halting.rule == rule
    batch = next(rows.in_order(len(rows)))
    with torch.no_grad():
        out = model(batch["input_ids"], position_ids=batch["position_ids"], adaptive=found.halting)
    assert float(out.metrics["think_iterations"].double().mean()) == pytest.approx(found.chosen.iterations, abs=0.02)
    named = {point.rule for point in found.curve}
    assert named == {*SCALES, "fixed", "random", "oracle"}
    by_rule = {name: [point for point in found.curve if point.rule == name] for name in named}
    etd = model.etd_config
    for point in found.curve:
        layers = etd.n_encoder_layers + etd.n_think_layers * point.iterations + etd.n_decoder_layers
        assert point.layers == pytest.approx(layers)
    assert [point.iterations for point in by_rule["fixed"]] == [1, 2, 3]
    assert all(point.readouts == 0 for point in by_rule["state"])
    assert all(point.readouts > 0 for point in by_rule["confidence"] if point.iterations > 1)
    assert by_rule["oracle"][0].loss < min(point.loss for point in by_rule["fixed"])
    assert found.chosen in found.curve
    assert found.shuffled.iterations == found.chosen.iterations
    dealt = [point.iterations for point in by_rule["random"]]
    assert dealt == pytest.approx([point.iterations for point in by_rule[rule]])


def test_a_tolerance_is_kept(model: Any, rows: PackedDataset) -> None:
    found = calibrate(model, rows, tolerance=0.05, batch_size=18)
    full = next(point for point in found.curve if point.rule == "fixed" and point.iterations == ITERATIONS)
    assert found.chosen.loss <= full.loss + 0.05
    assert found.chosen.iterations <= ITERATIONS


def test_what_cannot_be_calibrated_is_refused(model: Any, rows: PackedDataset) -> None:
    for options in ({}, {"target_iterations": 2.0, "tolerance": 0.1}):
        with pytest.raises(ValueError, match="Give either"):
            calibrate(model, rows, **options)
    with pytest.raises(ValueError, match="rule='stat' cannot be calibrated here"):
        calibrate(model, rows, rule="stat", tolerance=0.1)
    with pytest.raises(ValueError, match="needs a think block"):
        calibrate(wrap_transformer_with_etd(tiny("qwen3"), None), rows, tolerance=0.1)


def test_the_stored_threshold_is_used(model: Any, rows: PackedDataset, tmp_path: Path) -> None:
    found = calibrate(model, rows, rule="state", target_iterations=2.0, max_rows=4)
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()["etd"] | {"adaptive_depth": True, "halting": found.halting.model_dump()}
    loaded = mull.from_pretrained(tmp_path, etd=ETDConfig.model_validate(config))
    assert loaded.etd_config.halting_of(None) == found.halting
