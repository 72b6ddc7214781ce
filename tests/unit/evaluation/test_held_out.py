"""Claim: reading data and evaluating on it show how far they are, if they take long."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny

from mull.data.packing import pack_tokens
from mull.data.sources import load_documents
from mull.data.tasks import load_examples
from mull.evaluation.held_out import held_out_losses
from mull.retrofit.wrap import wrap_transformer_with_etd


@pytest.mark.parametrize("slow", [True, False])
def test_evaluation_counts_batches(
    slow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if slow:
        monkeypatch.setattr("mull.runtime.progress.PRINT_EVERY_SECONDS", 0.0)
    rows = pack_tokens([torch.arange(3, 90).tolist()] * 2, length=16, pad_id=0)
    held_out_losses(wrap_transformer_with_etd(tiny("qwen3"), None), rows, None, batch_size=4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1:] == (["held-out loss: batch 3 of 3, 00:00 left"] if slow else [])


@pytest.mark.parametrize("slow", [True, False])
def test_reading_counts_documents_and_records(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if slow:
        monkeypatch.setattr("mull.runtime.progress.PRINT_EVERY_SECONDS", 0.0)
    record = {"text": "a", "prompt": "b", "completion": "c"}
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(3 * (json.dumps(record) + "\n"))
    load_documents([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    load_examples(tmp_path, "examples")
    lines = capsys.readouterr().err.splitlines()
    expected = [f"reading: {unit} {number}" for unit in ("document", "record") for number in range(1, 7)]
    assert lines == (expected if slow else [])
