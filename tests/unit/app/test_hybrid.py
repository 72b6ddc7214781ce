"""Claim: ``mull convert --calibrate`` writes the measured start, and ``mull layers`` a choice that ``mull convert`` reads."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from mull.app import cli
from mull.app.commands import hybrid
from mull.data.packing import pack_texts
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.divergence import step_zero
from mull.evaluation.search.layer_choice import LayerChoice
from mull.retrofit.calibrate import CalibrationConfig, delta_mixer, mixers_in_place

TEXTS = [f"def {name}_{i}(x):\n    return {name} + x * {i}\n" for name in ("area", "sum", "mean") for i in range(150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of Qwen3 with their tokenizer, and two files of text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(TEXTS, 320)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("".join(TEXTS))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mull", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@torch.no_grad()
@pytest.mark.parametrize("fit", ["ridge", "scale"])
def test_convert_writes_the_calibrated_start(fit, checkpoint, tmp_path, monkeypatch, capsys):
    text = checkpoint / "text.txt"
    monkeypatch.setattr(hybrid, "CALIBRATION_TOKENS", 640)
    arguments = ["convert", checkpoint, "--calibrate", text, "--fit", fit, "--out", tmp_path / "hybrid"]
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").eval()

    teacher: Any = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    rows = hybrid.full_rows(pack_texts([text.read_text()], AutoTokenizer.from_pretrained(checkpoint), length=64))
    starts = hybrid.calibrated(teacher, rows, [0, 1, 2], CalibrationConfig(output=fit))
    ids = rows[20:23]
    with mixers_in_place(
        teacher.model.layers,
        {n: delta_mixer(teacher.model.layers[n], teacher.config, start) for n, start in starts.items()},
    ):
        expected = teacher(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert (teacher(ids).logits - expected).abs().max() > 0.01
    judged = list(rows[10:18].split(hybrid.CALIBRATION_BATCH))  # what follows the 640 tokens
    start = step_zero(teacher, judged, {"calibrated": starts}, progress=False)[0]
    assert "on 8 rows after the calibration's" in shown
    assert re.search(rf"^ *calibrated +{start.divergence:.4f} +{start.standard_error:.4f}$", shown, re.MULTILINE)


def test_convert_says_when_no_text_is_left_to_measure_on(checkpoint, tmp_path, monkeypatch, capsys):
    assert (
        run(monkeypatch, "convert", checkpoint, "--calibrate", checkpoint / "text.txt", "--out", tmp_path / "new") == 0
    )
    assert re.search(r"The calibration took all \d+ rows of the text, so none is left", capsys.readouterr().out)


def test_a_wrong_conversion_is_refused_before_it_calibrates(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hybrid, "calibrated", None)
    (tmp_path / "file").write_text("")
    for wrong in (["--out", tmp_path / "file"], ["--out", tmp_path / "new", "--layers", "7"]):
        assert run(monkeypatch, "convert", checkpoint, "--calibrate", checkpoint / "text.txt", *wrong) == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text(TEXTS[0])
    assert run(monkeypatch, "convert", checkpoint, "--calibrate", short, "--out", tmp_path / "new") == 2
    assert "fills less than two rows of 64 tokens: give more text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    ["uniform", "retrieval", *(pytest.param(name, marks=pytest.mark.slow) for name in ("replace-one", "gate"))],
)
def test_layers_writes_a_choice_that_convert_reads(method, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hybrid, "CALIBRATION_TOKENS", 320)
    file = tmp_path / "new" / "layers.json"
    options = ["--method", method, "--data", checkpoint / "text.txt", "--length", 24, "--rows", 4, "--keys", 2]
    if method == "gate":
        options[-6:] = ["--length", 8, "--rows", 2]
    assert run(monkeypatch, "layers", checkpoint, "--keep", 2, *options, "--out", file) == 0
    shown = capsys.readouterr().out
    choice = LayerChoice.model_validate_json(file.read_text())
    assert len(choice.keep) == 2
    assert choice.verdict in shown
    assert f"mull convert --layers {','.join(map(str, choice.deltanet))}" in shown
    assert {score.layer for score in choice.scores} == (set() if method == "uniform" else {0, 1, 2, 3})
    assert (choice.accuracy is not None) == (method == "retrieval")

    assert run(monkeypatch, "convert", checkpoint, "--layers", file, "--out", tmp_path / "hybrid") == 0
    kinds = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").config.layer_types
    assert tuple(number for number, kind in enumerate(kinds) if kind == "full_attention") == choice.keep


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("²/4", None, "--pattern ²/4 must be places and a period"),
        ("0,1/٤", None, "--pattern 0,1/٤ must be places and a period"),
        (None, "0,²", "--layers 0,² must be numbers of layers"),
        (None, "other.json", "other.json is no choice of layers: give the file that mull layers has written"),
    ],
)
def test_layers_that_cannot_be_read_are_refused_in_one_sentence(pattern, layers, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"keep": [1], "scores": "none"}')
    with pytest.raises(ValueError, match=message) as error:
        hybrid.parse_layers(pattern, layers)
    assert "\n" not in str(error.value)
